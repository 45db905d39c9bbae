"""Local updates: averages and steps on this machine, and rounds with overlap on emulated hosts."""
