"""Other tools for fewer synchronisations beside ours, on emulated hosts: `python -m benchmarks.tools`."""
