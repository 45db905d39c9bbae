"""What to send instead of every gradient in full: one file a method, all behind the interface of `base`."""
