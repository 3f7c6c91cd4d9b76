"""How a box follows the light and the optics of its line, and knows what product it sees; numpy and OpenCV only."""
