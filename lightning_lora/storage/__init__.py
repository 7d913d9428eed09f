"""Files: checkpoints, tensors, and how they are written at once or not at all."""
