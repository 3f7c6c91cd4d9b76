"""Frame -> Prediction: preprocessing, engines and the detector that joins them."""
