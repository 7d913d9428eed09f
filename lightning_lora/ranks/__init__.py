"""What rank each layer has: cutting it, and deciding it while training."""
