"""Is this machine ready to be a box: every check says what it saw, and the cure where something is wrong."""
