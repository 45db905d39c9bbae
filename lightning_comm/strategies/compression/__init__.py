"""The Lightning strategy of compressed gradients."""
