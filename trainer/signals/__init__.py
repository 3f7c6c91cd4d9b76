"""Signals of several channels: recordings, windows, training, evaluation and export of detectors for them."""
