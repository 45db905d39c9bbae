"""Local updates as a Lightning strategy."""
