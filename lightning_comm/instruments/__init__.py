"""Instruments that watch a run: collectives, gradients under DDP, busy time, clocks, and the probe of a link."""
