"""Attention by rows against transformers' own, and that nothing grows with the square of a sample's length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import samples_of, transformers, write_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convert_w4a8 import api
from convert_w4a8.calibration import attention
from convert_w4a8.calibration.block import Block
from convert_w4a8.calibration.model import Model
from convert_w4a8.samples.sample import SampleSet

CPU = torch.device("cpu")
WINDOW: dict[str, Any] = {"sliding_window": 24}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {**WINDOW, "num_key_value_heads": 1},
    "Qwen2": {**WINDOW, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "Gemma2": {**WINDOW, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0},
    "Gemma3": WINDOW,
    "Cohere2": WINDOW,
    "DeepseekV3": {
        "first_k_dense_replace": 2,
        "head_dim": 16,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "Llama4": {
        "attention_chunk_size": 24,
        "moe_layers": [],
        "intermediate_size_mlp": 256,
        "layer_types": ["chunked_attention", "full_attention"],
    },
}
"""Architecture → settings. Llama 4 has its chunks, Gemma its soft caps, DeepSeek values narrower than keys."""


@pytest.fixture(autouse=True)
def _soft_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Gemma 2 come here: newer versions of transformers refuse to let its soft caps be computed by torch."""
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", True)


def config_of(kind: str) -> str:
    """Return the name of a kind's configuration, of those that also see pictures that of the language model."""
    return {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}.get(kind, f"{kind}Config")


def write(kind: str, directory: Path) -> Path:
    """Write a model of two blocks."""
    return write_model(directory, f"{kind}ForCausalLM", config_of(kind), **KINDS[kind])


def outputs(directory: Path, samples: SampleSet) -> list[torch.Tensor]:
    """Return the hidden states after each block, [T, H], of the only sample."""
    model = Model(api.open_checkpoint(directory), CPU, torch.float32)
    tokens = torch.from_numpy(samples.samples[0].tokens).long()[None]
    states, found = model.first_states(tokens), []
    for number in range(len(model.blocks)):
        block = Block(model.load_block(number), [], torch.float32, label="")
        states = block.output(states, model.call(number, (1, len(samples.samples[0]))), quantized=False)
        found.append(states[0])
        block.release()
    return found


def by_transformers(directory: Path, samples: SampleSet, attention: str) -> list[torch.Tensor]:
    """Return the same by a whole model's own pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    found: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
    with torch.inference_mode():
        model(torch.from_numpy(samples.samples[0].tokens).long()[None], use_cache=False)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", [1 << 24, 2000], ids=["at once", "by rows"])
def test_blocks_give_what_transformers_gives(
    kind: str, scores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, chunks, soft caps, grouped heads, narrow values: at once and some rows at a time."""
    monkeypatch.setattr(attention, "SCORES", scores)
    directory, samples = write(kind, tmp_path / "model"), samples_of([100])
    for ours, theirs in zip(outputs(directory, samples), by_transformers(directory, samples, "eager"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Mistral", "Llama4"])
def test_a_window_matters_in_these_models(kind: str, tmp_path: Path) -> None:
    """So that the test above could fail: without its window, the first block gives something else."""
    samples = samples_of([100])
    windows = write(kind, tmp_path / "window")
    without = write_model(
        tmp_path / "without",
        f"{kind}ForCausalLM",
        config_of(kind),
        **{key: 4096 if value == 24 else value for key, value in KINDS[kind].items()},
    )
    one, other = (outputs(directory, samples)[0] for directory in (windows, without))
    torch.testing.assert_close(one[:24], other[:24])
    assert float((one[24:] - other[24:]).abs().max()) > 1e-3


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many elements the largest tensor has that any operation makes, views of others included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_grows_with_the_square_of_the_length(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen times as many tokens: the largest tensor has at most sixteen times as many elements."""
    monkeypatch.setattr(attention, "SCORES", 1 << 12)
    directory = write(kind, tmp_path / "model")
    found = []
    for length in (128, 2048):
        with Largest() as largest:
            outputs(directory, samples_of([length]))
        found.append(largest.elements)
    assert found[1] <= 16 * found[0]
    assert found[1] < 2048 * 2048 // 2


def test_a_model_that_computes_with_its_mask_gets_all_of_it() -> None:
    """As transformers would have made it."""
    interface = __import__("transformers.masking_utils", fromlist=["sdpa_mask"])
    function = interface.sliding_window_causal_mask_function(3)
    sizes = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": function, "local_size": 3}
    expected = interface.sdpa_mask(**sizes)
    for use_vmap in (False, True):
        mask = attention.make_mask(**sizes, use_vmap=use_vmap)
        assert isinstance(mask, attention.RowMask)
        scores = torch.zeros(2, 1, 7, 7)
        assert torch.equal(scores.masked_fill(mask, 1.0), scores.masked_fill(expected, 1.0))  # type: ignore[call-overload]
        assert torch.equal(torch.where(mask, scores, 1.0), torch.where(expected, scores, 1.0))  # type: ignore[call-overload]
        assert torch.equal(mask[:, :, 2:, :5], expected[:, :, 2:, :5])
        assert torch.equal(~mask, ~expected)
        assert torch.equal(mask & expected, expected)
        assert mask.shape == expected.shape
        first, rows = mask.rows(4, 6)
        assert torch.equal(rows, expected[:, :, 4:6, first:6])


def test_transformers_is_left_as_it_was() -> None:
    """Also after an error."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with attention.linear_memory():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention.attend
    with pytest.raises(KeyError), attention.linear_memory():
        raise KeyError
    assert (ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]) == before
