"""A zoo of whole models: vLLM's own classes, on a CPU, say whether what was converted is what is loaded.

A tiny random model of an architecture becomes an INT4 checkpoint (`models`, `sources`) and a BF16 one of the same
weights. The converter makes its outputs. vLLM builds the model from each directory and fills it with its own loader
(`engine`); every weight that it then holds is decoded (`holdings`) and compared with the BF16 one's (`judge`).
Nothing is run. This sees what tests of single layers cannot: names, lists of what is not quantized, merged and renamed
modules, loaders that slice or permute.

`python -m zoo` (see `__main__`) runs it, in a process of its own: `environment` says what that needs.
"""
