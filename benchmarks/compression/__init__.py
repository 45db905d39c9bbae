"""Compressed gradients and averages: synchronisations alone, steps on emulated hosts, and accuracy."""
