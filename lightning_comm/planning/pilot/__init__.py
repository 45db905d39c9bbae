"""A pilot's measurements, the run they predict, and the advice that follows."""
