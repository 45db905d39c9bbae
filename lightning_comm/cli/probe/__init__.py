"""The command `lightning-comm probe`."""
