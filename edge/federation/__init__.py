"""How a box and the fleet's aggregator exchange memories."""
