"""Several products on one box: which one is shown, and products added from files."""
