"""Optimizers as a strategy meets them: what they keep, whether they update by parameter, and what they send."""
