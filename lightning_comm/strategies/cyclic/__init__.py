"""The Lightning strategy of Cyclic Data Parallelism."""
