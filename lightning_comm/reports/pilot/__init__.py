"""The report of a pilot."""
