"""Which files: a checkpoint's directory and tensors, and writing one whole or not at all."""
