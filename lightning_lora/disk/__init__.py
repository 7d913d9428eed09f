"""Models in files: adapters brought together with a base, and merged into it, without the model's code."""
