"""Compressed memory bank with nearest-row distance."""
