"""One folder per system, all of one shape: model.py (pure nn.Module), fit.py (losses and schedule), README.md."""
