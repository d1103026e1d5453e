"""Several adapters trained at once over one base."""
