"""Experiments: one Python file each, with a `config` of frozen dataclasses and its command and cost."""
