"""Two places for bundles and one link: installed, tried, switched and taken back."""
