"""Properties of optimizers: their state, whether they update each parameter alone, and whether they communicate."""
