"""Shares by speed: `python -m benchmarks.adaptive_partition`, and accuracy beside even shares."""
