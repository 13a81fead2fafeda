"""Codebooks and codes for a weight matrix that is not quantized yet, from what its inputs are like."""
