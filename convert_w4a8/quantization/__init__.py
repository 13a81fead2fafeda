"""Which numbers: FP8 scales, tables and new codes for a layer, and the error that they leave."""
