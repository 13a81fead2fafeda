"""What the zoo says of one output. Needs neither vLLM nor torch."""

from dataclasses import dataclass

RIGHT, REFUSED, FAILS, WRONG = "right", "refused", "fails", "wrong"
UNLOADABLE, NOT_BUILT = "unloadable", "not built"
BAD = (FAILS, WRONG)
MODES = (("lut", "search"), ("lut", "direct"), ("compressed-tensors", "search"))
"""Output formats and their scales."""


@dataclass(frozen=True)
class Row:
    """One output, loaded by one rank of `tp`.

    status: "right"; "refused" by the converter, or at this tensor-parallel size for a rank's part of a layer; "fails"
        where vLLM, or our plugin in it, raises an error for an output; "wrong" where vLLM loads what is not the source,
        without an error; "unloadable" where it cannot load the BF16 twin on a CPU; "not built" where there is no such
        tiny model.
    layers: INT4 layers of the source. weights, int4: what vLLM holds, and how many of them in INT4.
    options: what the converter had to be told.
    """

    architecture: str
    format: str
    scales: str
    tp: int
    status: str
    reason: str = ""
    layers: int = 0
    weights: int = 0
    int4: int = 0
    options: str = ""
