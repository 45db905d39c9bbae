"""Cyclic Data Parallelism within one device: the engine, the delay, stages and their updates."""
