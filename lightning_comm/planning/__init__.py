"""Conclusions from measurements: costs of a step, projections to a whole run, and advice. Never torch."""
