"""OneNIP: features rebuilt from those of one good image of the product."""
