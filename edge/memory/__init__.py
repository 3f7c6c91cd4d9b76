"""What the box remembers of good parts; numpy only."""
