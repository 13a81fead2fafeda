"""Calibration data: samples of tokens, what each token is in the chat, and which of them count in statistics."""
