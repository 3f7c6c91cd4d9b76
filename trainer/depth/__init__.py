"""Learning from depth maps: the trunk that turns metres into local geometry, and what is trained on it."""
