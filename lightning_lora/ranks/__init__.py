"""Which rank each layer has: sharing a budget out, and deciding anew while training."""
