"""Messages between ranks: torch and torch.distributed, never Lightning."""
