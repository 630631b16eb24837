"""What every training backend needs around its forward pass."""
