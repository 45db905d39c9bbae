"""Loaders: torch.utils.data only, never Lightning."""
