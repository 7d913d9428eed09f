"""Several adapters at work together, one per sample of a batch and sums of adapters; and one cut to lower rank."""
