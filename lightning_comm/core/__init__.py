"""Numbers only: standard library and numpy, never torch. What trains, simulates and advises asks these files."""
