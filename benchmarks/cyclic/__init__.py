"""Cyclic Data Parallelism: steps on emulated hosts, memory, accuracy, and the check of contents."""
