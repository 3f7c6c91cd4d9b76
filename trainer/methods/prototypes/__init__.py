"""Prototypes by optimal transport: a compressed memory of patches, with or without places."""
