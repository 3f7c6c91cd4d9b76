"""Prediction -> Verdict and event: scores, thresholds, the life cycle of an anomaly."""
