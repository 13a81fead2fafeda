"""What calibration sees of a model, against transformers' own forward pass with hooks; going on after interruptions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import snapshot
from interruptions import interrupted_walk
from safetensors.torch import load_file, save_file
from tiny_models import samples_of, transformers, write_llama, write_mixtral, write_model

from convert_w4a8 import api
from convert_w4a8.calibration.block import Block, Stage, round_tokens
from convert_w4a8.calibration.model import Model
from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.states import batches
from convert_w4a8.calibration.walk import Walk
from convert_w4a8.errors import ConvertError
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.samples.sample import SampleSet

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
STAGES = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
CPU = torch.device("cpu")


def inputs_by_hand(directory: Path, samples: SampleSet, block: int) -> dict[str, torch.Tensor]:
    """Return what the layers of a block get for all tokens that count, float32 [M, K], by a whole model's own pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    kept: torch.Tensor

    def hook(name: str) -> Any:
        return lambda _module, args: found[name].append(args[0][0][kept])

    for name in LAYERS:
        model.get_submodule(f"model.layers.{block}.{name}").register_forward_pre_hook(hook(name))
    for sample in sorted(samples.samples, key=len):
        kept = torch.from_numpy(sample.kept)
        with torch.inference_mode():
            model(torch.from_numpy(sample.tokens).long()[None])
    return {name: torch.cat(parts) for name, parts in found.items()}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return x as the kernel sees it."""
    tokens, scale = quantize_tokens(x.bfloat16())
    return tokens.float() * scale


def moments(directory: Path, samples: SampleSet, tmp_path: Path) -> tuple[dict[str, Moments], list[Stage]]:
    """Return what the walk takes of the first block, of which nothing is quantized yet."""
    model = Model(api.open_checkpoint(directory), CPU, torch.float32)
    walk = Walk(model, batches(samples.samples), QuantizeOptions(), tmp_path, 1 << 30)
    names = [name for stage in STAGES for name in stage]
    block = Block(model.load_block(0), names, torch.float32, label="")
    stages = block.stages(walk._states(walk._original, 0), model.call(0, walk._batches[0].shape))
    return {stage.modules[0]: walk._moments(0, block, stage) for stage in stages}, stages


def test_moments_are_those_of_transformers(tmp_path: Path) -> None:
    """Of tokens that count alone, rounded to FP8 by token; layers that share an input share them."""
    directory = write_llama(tmp_path / "model")
    samples = samples_of([40, 64, 40, 17], masked=[3, 60, 0, 1])
    found, stages = moments(directory, samples, tmp_path)
    assert [stage.modules for stage in stages] == STAGES
    for name, x in inputs_by_hand(directory, samples, 0).items():
        assert found[name].tokens == len(x) == samples.kept
        second, cross = found[name].mean()
        assert cross is not None
        seen = rounded(x)
        # Hidden states are in BF16 between blocks, as when served; here these are the embeddings, which are so anyway.
        torch.testing.assert_close(second, seen.t() @ seen / len(x), rtol=2e-3, atol=2e-3 * float(second.abs().max()))
        torch.testing.assert_close(cross, x.t() @ seen / len(x), rtol=2e-3, atol=2e-3 * float(cross.abs().max()))


def test_masked_tokens_at_the_end_change_nothing(tmp_path: Path) -> None:
    """They come after all that count, which cannot see them."""
    directory = write_llama(tmp_path / "model", layers=1)
    short = samples_of([48])
    long = samples_of([80])
    long.samples[0].tokens[:48] = short.samples[0].tokens
    long.samples[0].masked_by[48:] = 1
    one, _ = moments(directory, short, tmp_path)
    other, _ = moments(directory, long, tmp_path)
    for name, ours in one.items():
        assert ours.tokens == other[name].tokens == 48
        torch.testing.assert_close(ours.mean(), other[name].mean(), rtol=1e-2, atol=1e-3)


def test_masked_tokens_are_attended_to(tmp_path: Path) -> None:
    """Those before the ones that count change what these give."""
    directory = write_llama(tmp_path / "model", layers=1)
    one, other = samples_of([48], masked=[20]), samples_of([48], masked=[20])
    other.samples[0].tokens[:20] = 7
    (ours, _), (theirs, _) = moments(directory, one, tmp_path), moments(directory, other, tmp_path)
    assert torch.equal(ours["self_attn.q_proj"].mean()[0], theirs["self_attn.q_proj"].mean()[0])
    assert not torch.allclose(ours["self_attn.o_proj"].mean()[0], theirs["self_attn.o_proj"].mean()[0], rtol=0.1)


def test_the_output_of_a_block_is_that_of_transformers(tmp_path: Path) -> None:
    """Of the original version; a mixture of experts too."""
    for write in (write_llama, write_mixtral):
        directory = write(tmp_path / write.__name__, layers=2)
        tokens = torch.from_numpy(samples_of([33]).samples[0].tokens).long()[None]
        whole = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        want = whole(tokens, output_hidden_states=True).hidden_states[1]
        model = Model(api.open_checkpoint(directory), CPU, torch.float32)
        states = model.first_states(tokens)
        names = ["self_attn.o_proj", *(["mlp.experts"] if write is write_mixtral else [])]
        block = Block(model.load_block(0), names, torch.float32, label="")
        got = block.output(states, model.call(0, (1, 33)), quantized=False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rounding_is_that_of_the_kernel() -> None:
    """By token, from BF16."""
    x = torch.randn(3, 5, 128)
    assert torch.equal(round_tokens(x), rounded(x.flatten(0, 1)).view(3, 5, 128))


@pytest.mark.parametrize("preset", ["fast", "full"])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resumed_at_a_block(preset: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is the same bytes, whichever block was interrupted; what was finished before is not done again."""
    model = write_llama(tmp_path / "in", layers=3)
    options, samples = QuantizeOptions(preset=preset), samples_of([40, 56])  # type: ignore[arg-type]
    api.quantize(model, tmp_path / "whole", options, samples=samples, device="cpu")
    with interrupted_walk(monkeypatch, stop, after=2) as quantized:
        api.quantize(model, tmp_path / "out", options, samples=samples, device="cpu")
    assert not (tmp_path / "out").exists()
    done = list(quantized)
    api.quantize(model, tmp_path / "out", options, samples=samples, device="cpu", resume=True)
    assert quantized[len(done) :] == [number for number in range(3) if number >= done[-1]]
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_what_transformers_keeps_in_float32_is_not_rounded(tmp_path: Path) -> None:
    """On a GPU blocks are in BF16, in which corrections of a router's scores would be the same for all experts."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "moe_intermediate_size": 256, "num_experts_per_tok": 2}
    more = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
    directory = write_model(tmp_path / "model", "Glm4MoeForCausalLM", "Glm4MoeConfig", layers=1, **sizes, **more)
    found = load_file(directory / "model.safetensors")
    name = "mlp.gate.e_score_correction_bias"
    found[f"model.layers.0.{name}"] = correction = torch.tensor([9.001, 9.002, 9.003, 9.004])
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint = api.open_checkpoint(directory)
    model = Model(checkpoint, CPU, torch.bfloat16)
    block = model.load_block(0)
    assert torch.equal(block.get_buffer(name), correction)
    model.load_again(0, checkpoint)
    assert torch.equal(block.get_buffer(name), correction)
    assert block.get_parameter("input_layernorm.weight").dtype is torch.bfloat16


def test_samples_longer_than_learned_positions(tmp_path: Path) -> None:
    """Are one line, and nothing is left; as many tokens as there are positions are taken."""
    sizes = {"ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 16}
    model = write_model(tmp_path / "model", "OPTForCausalLM", "OPTConfig", layers=1, **sizes)
    with pytest.raises(ConvertError, match="sample 1: has 17 tokens, and the model 16 positions"):
        api.quantize(model, tmp_path / "out", samples=samples_of([16, 17]), device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    api.quantize(model, tmp_path / "out", samples=samples_of([16, 16]), device="cpu")
