"""How the box is doing."""
