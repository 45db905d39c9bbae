"""Shares of a global batch for ranks of unequal speed: their computation from measured speeds, and their changes."""
