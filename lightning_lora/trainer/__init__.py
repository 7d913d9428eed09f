"""What a Trainer needs besides adapters: strategies, checkpoints, checks, the company of other callbacks."""
