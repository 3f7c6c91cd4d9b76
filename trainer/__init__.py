"""On the GPU (or a patient CPU): data of good parts in, anomaly detectors out."""
