"""Pruned weights under any technique that sends them as a sparse mask does: kept at zero, and in checkpoints."""
