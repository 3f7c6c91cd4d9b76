"""Networks with ImageNet weights that come in a pip package."""
