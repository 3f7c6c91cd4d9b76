"""Readers of image folders, and the generated data that needs no download."""
