"""Instruments: how near the emulated links come to what they state, and what the profiler costs."""
