"""How the GEMMs over experts of some mixtures are cut on Hopper: as measured, or as for the next number of pairs."""

Cut = tuple[int, int, int, int, int | None, bool, int, int | None, bool, int | None]
"""Fields of a `grouped_launch.Launch`: splits, block_n, stages, warps, columns, indexed, apart, registers, chain,
overlap."""

LAUNCHES: dict[tuple[int, int, int, int], tuple[int, Cut, Cut]] = {
    (8, 4096, 14336, 2): (
        8,
        (1, 64, 4, 4, 4, True, 0, None, False, None),
        (8, 128, 3, 4, 64, True, 1, 128, False, None),
    ),
    (8, 4096, 14336, 16): (
        8,
        (1, 128, 3, 4, 1, True, 0, None, False, 0),
        (2, 64, 4, 4, 64, True, 1, None, False, None),
    ),
    (8, 4096, 14336, 32): (
        8,
        (1, 128, 3, 4, 64, True, 0, None, False, 0),
        (2, 128, 3, 4, 16, True, 2, 128, False, None),
    ),
    (8, 4096, 14336, 64): (
        16,
        (1, 64, 4, 4, None, True, 0, None, False, 0),
        (4, 128, 3, 4, 1, True, 0, None, False, None),
    ),
    (8, 4096, 14336, 128): (
        32,
        (1, 128, 3, 4, None, True, 0, None, True, 0),
        (1, 64, 4, 4, None, True, 0, None, True, 1),
    ),
    (8, 4096, 14336, 256): (
        64,
        (1, 128, 3, 4, None, True, 0, None, True, 0),
        (1, 128, 3, 4, None, True, 0, None, True, 0),
    ),
    (8, 4096, 14336, 512): (
        80,
        (1, 64, 3, 4, None, False, 0, None, True, 3),
        (1, 128, 3, 8, None, False, 0, 128, True, 3),
    ),
    (128, 2048, 768, 8): (
        8,
        (1, 64, 4, 4, None, True, 0, None, False, None),
        (1, 64, 4, 4, None, True, 0, None, False, None),
    ),
    (128, 2048, 768, 64): (
        8,
        (1, 128, 3, 4, None, True, 0, None, False, None),
        (1, 128, 3, 4, None, True, 0, None, False, None),
    ),
    (128, 2048, 768, 128): (
        8,
        (1, 128, 3, 4, 64, True, 1, 128, False, None),
        (1, 128, 3, 4, 16, True, 0, None, False, None),
    ),
    (128, 2048, 768, 256): (
        8,
        (1, 128, 3, 4, 64, True, 1, 128, False, None),
        (1, 128, 3, 4, None, True, 0, None, False, None),
    ),
    (128, 2048, 768, 512): (
        16,
        (1, 128, 3, 4, 1, True, 0, None, False, None),
        (1, 128, 3, 4, 16, True, 0, None, False, None),
    ),
    (128, 2048, 768, 1024): (
        16,
        (1, 128, 3, 4, None, True, 0, None, False, None),
        (1, 128, 3, 4, None, True, 0, None, False, None),
    ),
    (128, 2048, 768, 2048): (
        32,
        (1, 128, 3, 4, None, False, 0, None, True, None),
        (1, 128, 3, 4, None, False, 0, None, True, None),
    ),
}
"""Pairs of a block, and the cuts of gate-up and down; by experts, hidden and intermediate size, and pairs of tokens and
experts, a power of two."""
