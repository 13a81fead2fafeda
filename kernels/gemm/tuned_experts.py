"""How the GEMMs over experts of some mixtures are cut on Hopper, as `scripts/gpu/tune_experts.py` measured it."""

Cut = tuple[int, int, int, int, int | None]
"""Least groups of K of a program, channels of a block, copies in flight, warps, and blocks of channels before the next block of pairs."""

LAUNCHES: dict[tuple[int, int, int, int], tuple[int, Cut, Cut]] = {}
"""Pairs of a block, and the cuts of gate-up and down; by experts, hidden and intermediate size, and pairs of tokens and
experts, a power of two."""
