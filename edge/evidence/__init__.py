"""Pictures of what was found: kept on disk under a byte cap, fetched on command."""
