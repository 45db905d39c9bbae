"""Work of one process on its device: torch, and no messages to other ranks."""
