"""Compressed gradients as a Lightning strategy."""
