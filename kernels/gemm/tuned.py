"""How GEMMs of some sizes are cut on Hopper, as `scripts/gpu/tune_gemm.py` measured and wrote it."""

LAUNCHES: dict[tuple[int, int, int, int], tuple[int, int]] = {}
"""Parts of K and copies in flight, by N, K, tokens of a block and FP8 terms of an activation."""
