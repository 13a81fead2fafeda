"""From a model in 16 bits to W4A8: what its layers see, and the codes and tables that suit it."""
