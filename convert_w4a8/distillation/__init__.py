"""Training a W4A8 checkpoint to give the predictions of the model it was made from."""
