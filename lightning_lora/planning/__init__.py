"""From a config and a model to the exact list of changes: what is meant, what is missed, what cannot be."""
