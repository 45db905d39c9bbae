"""Injected faults, and what becomes of runs and checkpoints: `python -m benchmarks.faults`."""
