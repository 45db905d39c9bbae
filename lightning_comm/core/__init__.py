"""Arithmetic: standard library and numpy, never torch. Strategies, instruments, the pilot and the tests use it."""
