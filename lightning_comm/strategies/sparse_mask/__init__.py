"""Pruned weights, for all techniques that send with a sparse mask: kept at zero, and saved in checkpoints."""
