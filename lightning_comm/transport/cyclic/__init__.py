"""The messages of Cyclic Data Parallelism."""
