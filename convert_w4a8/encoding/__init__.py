"""How the bits lie: packings, the kernel's reordered layout, FP8 tables, and the weights that they mean."""
