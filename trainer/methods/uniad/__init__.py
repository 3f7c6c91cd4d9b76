"""UniAD: one reconstructor of features for many products."""
