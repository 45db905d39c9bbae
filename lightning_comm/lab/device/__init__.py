"""An emulated device: a module that computes at the pace of a device of a stated speed."""
