"""Does a checkpoint still convert as well as it did? For CI."""
