"""MMAE-ECG: rebuild hidden segments of a signal from the segments around them, at two scales."""
