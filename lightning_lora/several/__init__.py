"""Several adapters at once."""
