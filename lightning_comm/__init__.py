"""Communication-efficient training for PyTorch Lightning."""
