"""Show it: a checkpoint at a glance, and a conversion in numbers and pictures."""
