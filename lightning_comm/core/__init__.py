"""Numbers only: standard library and numpy, never torch. What trains, measures and plans asks these files."""
