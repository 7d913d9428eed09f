"""Everything that knows Lightning: one run of the callback, checkpoints, checks, and the strategies."""
