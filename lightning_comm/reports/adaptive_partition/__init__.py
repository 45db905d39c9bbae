"""The report of a partitioned run."""
