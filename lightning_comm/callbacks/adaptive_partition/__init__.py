"""The callback that moves the shares of a partitioned global batch."""
