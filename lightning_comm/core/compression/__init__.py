"""What compressions send, as formulas, and when weights are pruned."""
