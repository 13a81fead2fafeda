"""What the plugin asks of vLLM is what vLLM's own W4A8 methods ask: the calls side by side, read from both sources."""

import ast
from pathlib import Path

import pytest
import vllm_sources
from paths import ROOT

PLUGIN = ROOT / "convert_w4a8" / "vllm_plugin"
STOCK = "vllm/model_executor"
CALLS = {
    "QuantFP8": ("linear.py", "kernels/linear/mixed_precision/cutlass.py"),
    "int4_w4afp8_moe_quant_config": ("moe.py", "layers/fused_moe/oracle/w4a8.py"),
}
"""By what is called: our file, and vLLM's."""


def constants(path: Path, called: str) -> dict[str, str]:
    """Return the keyword arguments of the only call in a file that are not tensors: flags and names."""
    (call,) = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == called
    )
    assert not call.args
    found = {str(keyword.arg): ast.unparse(keyword.value) for keyword in call.keywords}
    return {name: value for name, value in found.items() if not name.endswith(("_scale", "_alphas"))}


@pytest.mark.parametrize("version", vllm_sources.VERSIONS)
@pytest.mark.parametrize("called", CALLS)
def test_flags_are_those_of_stock_w4a8(called: str, version: str) -> None:
    """Activations are quantized per token and weights per output channel, as the kernels expect."""
    ours, theirs = CALLS[called]
    flags = constants(vllm_sources.sources(version) / STOCK / theirs, called)
    assert len(flags) == 2
    assert constants(PLUGIN / ours, called) == flags
