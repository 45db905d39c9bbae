"""Cyclic Data Parallelism as a Lightning strategy."""
