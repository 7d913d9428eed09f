"""From a config and a model to the exact list of changes, or to one error with every problem."""
