"""Defects made on images of good parts, seeded and with exact masks."""
