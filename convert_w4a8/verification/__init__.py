"""Prove it: an output compared with its source, from the bytes of both."""
