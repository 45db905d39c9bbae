"""The command `lightning-comm demo`."""
