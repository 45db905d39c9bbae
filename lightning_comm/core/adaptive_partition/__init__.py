"""Shares of a global batch for ranks of unequal speed: how they are solved for, kept, learnt and moved."""
