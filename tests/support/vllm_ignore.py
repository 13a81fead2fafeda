"""Which layers vLLM takes as quantized: its own functions, for both output formats."""

import ast
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_sources import isolated, sources

_QUANTIZATION = "vllm/model_executor/layers/quantization"
_COMPRESSED = f"{_QUANTIZATION}/compressed_tensors"
_CT_FILE = f"{_COMPRESSED}/compressed_tensors.py"
_MOE_FILE = f"{_COMPRESSED}/compressed_tensors_moe/compressed_tensors_moe.py"


class Asked:
    """A model's quantization, as vLLM has it when it builds the layers.

    prefixes, packed: the prefixes of the model's `hf_to_vllm_mapper`, and its `packed_modules_mapping`.
    """

    def __init__(
        self, root: Path, block: dict[str, Any], prefixes: Mapping[str, str], packed: Mapping[str, Sequence[str]]
    ) -> None:
        self.root, self.packed = root, {name: list(shards) for name, shards in packed.items()}
        utils = import_module("vllm.model_executor.models.utils")
        mapper = utils.WeightsMapper(orig_to_new_prefix=dict(prefixes))
        self.form: Any = None
        if block["quant_method"] != "compressed-tensors":
            lut_format = import_module("convert_w4a8.lut_format")
            self.form = lut_format.LutFormat.parse(block).renamed(mapper.apply_list)
            return
        config = SimpleNamespace(ignore=list(block["ignore"]), target_scheme_map={}, kv_cache_scheme=None)
        _function(root / _CT_FILE, "CompressedTensorsConfig", "apply_vllm_mapper", {})(config, mapper)
        self.ignore = config.ignore

    def quantizes(self, layer: str) -> bool:
        """Whether vLLM takes a linear layer, perhaps a merged one, as quantized."""
        if self.form is not None:
            return not self.form.is_ignored(layer, self.packed)
        utils = import_module("vllm.model_executor.layers.quantization.compressed_tensors.utils")
        return not utils.should_ignore_layer(layer, ignore=self.ignore, fused_mapping=self.packed)

    def quantizes_experts(
        self, layer: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> bool:
        """Whether vLLM takes the experts of a layer, `….experts`, as quantized; `names` of gate, up, down."""
        gate, up, down = names
        if self.form is not None:
            return not self.form.are_experts_ignored(layer, 4, (gate, down, up))
        marker = object()
        space = {"UnquantizedFusedMoEMethod": lambda _config: marker}
        routed = SimpleNamespace(
            ckpt_gate_proj_name=gate, ckpt_up_proj_name=up, ckpt_down_proj_name=down, moe_config=None
        )
        config = SimpleNamespace(
            _add_fused_moe_to_target_scheme_map=lambda: None,
            get_scheme_dict=lambda _layer, name: {} if self.quantizes(name) else None,
        )
        try:
            method = _function(self.root / _MOE_FILE, "CompressedTensorsMoEMethod", "get_moe_method", space)
            return method(config, routed, layer) is not marker
        except AttributeError:  # the first question after that: which scheme it is
            return True


@contextmanager
def asked(
    version: str, block: dict[str, Any], prefixes: Mapping[str, str], packed: Mapping[str, Sequence[str]]
) -> Iterator[Asked]:
    """Return how a model of vLLM asks about the layers of a checkpoint with this `quantization_config`."""
    with isolated(version):
        yield Asked(sources(version), block, prefixes, packed)


def _function(path: Path, owner: str, name: str, space: dict[str, Any]) -> Any:
    """Return one method of a class of a file that cannot be imported, as it is there."""
    text = path.read_text(encoding="utf-8")
    (found,) = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef) and node.name == owner)
    (method,) = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == name)
    code = textwrap.dedent(ast.get_source_segment(text, method, padded=True) or "")
    space = {"torch": import_module("torch"), "FusedMoEMethodBase": object, **space}
    exec(f"from __future__ import annotations\n{code}", space)
    return space[name]
