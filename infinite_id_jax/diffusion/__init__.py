"""Schedules, samplers and guidance as pure functions that receive a `denoise` callable."""
