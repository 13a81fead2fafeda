"""Do it: the plan of a conversion, its layers and shards, and what was done."""
