"""The names of a checkpoint's files: one definition for whoever opens, fetches, copies, uploads or compares them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

CONFIG = "config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MISTRAL_CONFIG = "params.json"
SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
"""Where tools leave the settings of a quantization beside config.json: AutoGPTQ, AutoAWQ's first versions, AutoRound,
ModelOpt. vLLM looks for them under these names (`get_config_filenames` of its quantization methods)."""

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".nemo")
"""Ends of names of files that may be pickles. They are neither opened nor copied: reading one can run code."""
OTHER_FORMATS = (
    *(".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel"),
    *(".engine", ".trt", ".ot", ".pte", ".llamafile"),
)
"""The same of weights in the formats of other programs."""
OTHER_FORMS = frozenset({"original", "metal", "onnx", "openvino", "gguf", "mlx", "coreml", "tensorrt", "trt"})
"""Directories for the same weights in another form. vLLM does not load `original/` either."""

_INDEX = re.compile(r".+\.safetensors\.index(\.\w+)?\.json")
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_VARIANT = re.compile(r"(?P<stem>.+)\.\w+?(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class LeftOut:
    """A file or link of a checkpoint, relative to it, that is neither read nor copied, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        """Render as one line."""
        return f"{self.path} ({self.reason})"


def is_index(name: str) -> bool:
    """Whether a name is that of an index of safetensors files: transformers', AutoGPTQ's or Mistral's."""
    return _INDEX.fullmatch(name) is not None


def is_consolidated(name: str) -> bool:
    """Whether a name is that of weights or an index in Mistral's own form.

    Where a file `consolidated*.safetensors` lies anywhere in a checkpoint, vLLM loads those and nothing else.
    """
    return name.startswith("consolidated") and (name.endswith(SAFETENSORS) or is_index(name))


def is_adapter(name: str) -> bool:
    """Whether a name is that of a LoRA adapter's weights, as PEFT saves them."""
    return name.startswith("adapter_model") and name.endswith(SAFETENSORS)


def is_shard(name: str) -> bool:
    """Whether a name says that there are more files of the same weights."""
    return _SHARD.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether a name may be that of an output's weights."""
    return _OURS.fullmatch(name) is not None


def is_variant(name: str, names: Iterable[str]) -> bool:
    """Whether a file is a variant of one of the others, such as model.fp16.safetensors of model.safetensors."""
    match = _VARIANT.fullmatch(name)
    return match is not None and f"{match['stem']}{SAFETENSORS}" in names


def needs_index(relative: PurePath) -> bool:
    """Whether vLLM would load a side file of an output as weights, unless an index says which files are."""
    return relative.name == str(relative) and relative.name.endswith(SAFETENSORS)


def describes(name: str) -> bool:
    """Whether a file at the top of a checkpoint says what its weights are: settings, indexes, the card."""
    return name in (CONFIG, CARD, *SETTINGS_FILES) or is_index(name)
