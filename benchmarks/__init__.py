"""Measurements on private servers; each module is a command: `python -m benchmarks.recovery`."""
