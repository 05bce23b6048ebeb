"""Measurements that are too large for the tests; each is a script that prints a table."""
