"""The command `lightning-comm pilot`."""
