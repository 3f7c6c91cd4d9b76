"""Fleet memory: one shared generator of patch rows, a local bank and the fleet's bank beside each other (FedDyMem)."""
