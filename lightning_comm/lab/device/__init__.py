"""An emulated device: a module that computes as fast as a device of a stated speed."""
