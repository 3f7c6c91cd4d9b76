"""The fleet's aggregator: memory updates in, a better memory out."""
