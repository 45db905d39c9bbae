"""The parts that all strategies share."""
