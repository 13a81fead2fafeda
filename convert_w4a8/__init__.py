"""Convert W4A16 checkpoints (AWQ, GPTQ, compressed-tensors) to W4A8 for vLLM on NVIDIA Hopper."""

__version__ = "0.1.0"
