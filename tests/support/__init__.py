"""What tests share: real processes, and small models."""
