"""The Lightning strategy of local updates."""
