"""Integration with the Trainer: strategies, checkpoints, checks and other callbacks."""
