"""The loader of a partitioned global batch."""
