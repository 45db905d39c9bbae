"""Bytes of compressions, as formulas, and the schedule by which weights are pruned."""
