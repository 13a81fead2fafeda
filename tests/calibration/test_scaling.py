"""AWQ scaling: every place a scale goes to, that the model in 16 bits stays the same, and what `verify` makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import REMOVE, edit_json, edit_tensors, snapshot
from interruptions import interrupted_walk
from safetensors.torch import load_file, save_file
from tiny_models import samples_of, transformers, write_gemma, write_llama, write_mixtral, write_qwen3_moe

from convert_w4a8 import api
from convert_w4a8.calibration import matrix, mixture, scaling, walk
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.checkpoint.folds import find_folds, origin_channels, powers_of_two
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.targets import lut

SAMPLES = [100, 60]


def write_gqa(directory: Path) -> Path:
    """Write a Llama with biases and two query heads for each value head."""
    sizes: Any = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    write_llama(directory, layers=2, mlp_bias=True, **sizes)
    edit_tensors(directory, fill_biases)
    return directory


def fill_biases(tensors: dict[str, torch.Tensor]) -> None:
    """Let biases be other than zero."""
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.copy_(torch.linspace(-0.5, 0.5, len(tensor)))


def write_shared_expert(directory: Path) -> Path:
    """Write a Qwen2-MoE, whose shared expert and its gate get what the router gets."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    experts = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 4}
    config = transformers.Qwen2MoeConfig(
        **sizes, **experts, num_experts_per_tok=2, vocab_size=256, num_hidden_layers=1, max_position_embeddings=512
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen2MoeForCausalLM(config).bfloat16().save_pretrained(directory)
    edit_tensors(directory, fill_biases)
    return directory


def scale_by_chance(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Let scales be powers of two that have nothing to do with the inputs: everything is scaled, and differently."""

    def choose(weights: Any, energies: torch.Tensor, _method: Any, tie: torch.Tensor | None = None) -> Any:
        k = len(energies) if tie is None else int(tie.max()) + 1
        generator = torch.Generator().manual_seed(seed + k + len(weights))
        s = torch.randint(-1, 2, (k,), generator=generator).float().exp2()
        return (s if tie is None else s[tie]), 0.5

    monkeypatch.setattr(scaling, "awq_exponent", choose)
    monkeypatch.setattr(mixture, "awq_exponent", choose)


@pytest.fixture
def _any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_by_chance(monkeypatch)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(directory: Path, tokens: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Return what transformers' model gives for tokens, in float32; of other weights if there are some."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if state is not None:
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert not [name for name in missing if "layers" in name]
    with torch.inference_mode():
        found: torch.Tensor = model(tokens).logits
    return found


def experts_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights by transformers' names, which has the experts of a block in one tensor."""
    names = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    found = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        found[name] = tensor
    for stack in {name.split(".experts.")[0] for name in found if ".experts." in name}:
        count = sum(name.startswith(f"{stack}.experts.") and "down_proj" in name for name in found)
        parts = [
            [found.pop(f"{stack}.experts.{i}.{leaf}.weight") for i in range(count)]
            for leaf in ("gate_proj", "up_proj", "down_proj")
        ]
        gate_up = [torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True)]
        found[f"{stack}.experts.gate_up_proj"] = torch.stack(gate_up)
        found[f"{stack}.experts.down_proj"] = torch.stack(parts[2])
    return found


WRITERS = [write_gqa, write_mixtral, write_qwen3_moe, write_shared_expert]


@pytest.mark.usefixtures("_any_scale")
@pytest.mark.parametrize("output", ["lut", "w4a16"])
@pytest.mark.parametrize("write", WRITERS)
def test_every_place(
    write: Callable[[Path], Path], output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, routers, biases and weights that are not quantized are scaled with those that are.

    Quantization is exact here: each layer is put back as it was to be, so that the output is the model itself.
    """
    model = write(tmp_path / "in")
    wanted: dict[str, torch.Tensor] = {}
    target = matrix._target

    def kept(name: str, weight: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        wanted[name] = weight.clone()
        return target(name, weight, *rest)

    monkeypatch.setattr(matrix, "_target", kept)
    options = QuantizeOptions(format=output, tables="scale", preset="fast")  # type: ignore[arg-type]
    result = api.quantize(model, tmp_path / "out", options, samples=samples_of(SAMPLES), device="cpu")
    assert api.verify(tmp_path / "out", model).problems == ()
    exponents = {layer.plan.module: layer.notes["awq_exponent"] for layer in result.layers}
    assert set(exponents.values()) == {0.5}
    assert all(layer.stats is not None and layer.stats.sqnr_db > 12 for layer in result.layers)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    blocks = [name for name in before if "layernorm" in name or "gate.weight" in name or "v_proj.bias" in name]
    assert {name for name in blocks if name in after} <= changed
    names = {"block_sparse_moe": "mlp", ".w1": ".gate_proj", ".w2": ".down_proj", ".w3": ".up_proj"}
    state = {}
    for layer in result.layers:
        name = layer.plan.module
        theirs = name
        for old, new in names.items():
            theirs = theirs.replace(old, new)
        found = wanted.get(name)
        state[f"{name}.weight"] = wanted[theirs] if found is None else found
    state |= {name: tensor.float() for name, tensor in after.items() if name in before}
    tokens = torch.arange(50)[None] * 5
    ours = logits(model, tokens, experts_of(state))
    torch.testing.assert_close(ours, logits(model, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_any_scale")
def test_layers_that_stay_in_16_bits_are_scaled(tmp_path: Path) -> None:
    """o_proj behind a quantized v_proj; gate and up behind a norm whose other layer is none."""
    model = write_gqa(tmp_path / "in")
    options = QuantizeOptions(tables="scale", preset="fast", keep=(r"re:.*\.1\..*\.q_proj",))  # type: ignore[arg-type]
    api.quantize(model, tmp_path / "out", options, samples=samples_of(SAMPLES), device="cpu")
    assert api.verify(tmp_path / "out", model).problems == ()


@pytest.mark.usefixtures("_any_scale")
def test_norms_that_are_one_more_are_left_alone(tmp_path: Path) -> None:
    """Gemma's: scaling them changes the outputs, which is seen; up and down are scaled all the same."""
    model = write_gemma(tmp_path / "in")
    options = QuantizeOptions(tables="scale", preset="fast")  # type: ignore[arg-type]
    result = api.quantize(model, tmp_path / "out", options, samples=samples_of(SAMPLES), device="cpu")
    assert api.verify(tmp_path / "out", model).problems == ()
    found = {layer.plan.module.rpartition(".")[2]: layer.notes["awq_exponent"] for layer in result.layers}
    assert {name: found[name] for name in ("q_proj", "gate_proj")} == {"q_proj": None, "gate_proj": None}
    assert {name: found[name] for name in ("o_proj", "down_proj")} == {"o_proj": 0.5, "down_proj": 0.5}
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name


@pytest.mark.usefixtures("_any_scale")
@pytest.mark.parametrize("write", [write_gqa, write_mixtral])
def test_resumed_is_the_same(write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on behind a finished block sees its scaled norms."""
    model = write(tmp_path / "in")
    if write is write_mixtral:
        model = write_mixtral(tmp_path / "two", layers=2)
    options, samples = QuantizeOptions(tables="scale", awq_scaling=True), samples_of([40, 56])  # type: ignore[arg-type]
    api.quantize(model, tmp_path / "whole", options, samples=samples, device="cpu")
    with interrupted_walk(monkeypatch, 1):
        api.quantize(model, tmp_path / "out", options, samples=samples, device="cpu")
    api.quantize(model, tmp_path / "out", options, samples=samples, device="cpu", resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("write", [write_gqa, write_qwen3_moe])
def test_a_block_has_one_scaling(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the files of a block, and resumed where other scales are chosen, as on another device."""
    model = write(tmp_path / "in")
    options = QuantizeOptions(tables="scale", preset="fast", max_shard_size=200_000)  # type: ignore[arg-type]
    arguments: Any = {"samples": samples_of(SAMPLES), "device": "cpu"}
    scale_by_chance(monkeypatch)
    with monkeypatch.context() as patch:
        finish = CheckpointWriter.finish
        begun: list[str] = []

        def interrupt(self: CheckpointWriter, writer: Any, *rest: Any) -> None:
            begun.extend(spec.name for spec in writer._plan.specs[:1] if ".layers." in spec.name)
            if len(begun) == 2:
                raise KeyboardInterrupt
            finish(self, writer, *rest)

        patch.setattr(CheckpointWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(model, tmp_path / "out", options, **arguments)
    left = set(snapshot(tmp_path / ".out.w4a8-partial" / "checkpoint"))
    scale_by_chance(monkeypatch, seed=1)
    api.quantize(model, tmp_path / "whole", options, **arguments)
    assert left < set(snapshot(tmp_path / "whole"))
    api.quantize(model, tmp_path / "out", options, **arguments, resume=True)
    assert api.verify(tmp_path / "out", model).problems == ()


@pytest.mark.usefixtures("_any_scale")
def test_a_scale_is_tried_with_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the longest sample is."""
    model = write_llama(tmp_path / "in", layers=1)
    seen: list[Any] = []
    monkeypatch.setattr(walk, "BATCH_TOKENS", 32)

    def scale(*args: Any) -> Any:
        seen.append(args[3].shape[:2])
        return scaling.scale_block(*args)

    monkeypatch.setattr(walk, "scale_block", scale)
    options = QuantizeOptions(tables="scale", preset="fast")  # type: ignore[arg-type]
    api.quantize(model, tmp_path / "out", options, samples=samples_of(SAMPLES), device="cpu")
    assert seen == [(1, 32)]
    assert api.verify(tmp_path / "out", model).problems == ()


@pytest.mark.usefixtures("_any_scale")
def test_nothing_is_scaled_beside_an_adapter(tmp_path: Path) -> None:
    """It gets the inputs of the layers that it changes."""
    model = write_llama(tmp_path / "in", layers=1)
    save_file({"base.q_proj.lora_A.weight": torch.ones(8, 128)}, model / "adapter_model.safetensors")
    options = QuantizeOptions(tables="scale", preset="fast")  # type: ignore[arg-type]
    result = api.quantize(model, tmp_path / "out", options, samples=samples_of(SAMPLES), device="cpu")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not any("awq_exponent" in layer.notes for layer in result.layers)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


def _factor(dim: int, index: int, by: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.select(dim, index).mul_(by)


BLOCK = "model.layers.0."
DAMAGE: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    "a norm by two": (f"{BLOCK}input_layernorm.weight", _factor(0, 40, 2)),
    "a norm by a hundredth": (f"{BLOCK}post_attention_layernorm.weight", _factor(0, 7, 1.01)),
    "a bias by two": (f"{BLOCK}self_attn.v_proj.bias", _factor(0, 1, 2)),
    "a bias that is not scaled": (f"{BLOCK}self_attn.q_proj.bias", _factor(0, 9, 2)),
    "the channel scale of v by two": (f"{BLOCK}self_attn.v_proj.weight_chan_scale", _factor(0, 3, 2)),
    "the channel scale of up by two": (f"{BLOCK}mlp.up_proj.weight_chan_scale", _factor(0, 3, 0.5)),
}


@pytest.mark.usefixtures("_any_scale")
def test_damage_is_found(tmp_path: Path) -> None:
    """Each of them, one at a time."""
    model = write_gqa(tmp_path / "in")
    options = QuantizeOptions(tables="scale", preset="fast")  # type: ignore[arg-type]
    api.quantize(model, tmp_path / "out", options, samples=samples_of(SAMPLES), device="cpu")
    files = {name: file for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    for what, (name, damage) in DAMAGE.items():
        good, tensors = files[name].read_bytes(), load_file(files[name])
        damage(tensors[name])
        save_file(tensors, files[name], {"format": "pt"})
        assert api.verify(tmp_path / "out", model).problems, what
        files[name].write_bytes(good)
    assert api.verify(tmp_path / "out", model).problems == ()


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_record_says_whether_inputs_were_scaled(
    is_scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves decoding v and up twice; outputs without it verify too, and a wrong one hides nothing."""
    model, out = write_gqa(tmp_path / "in"), tmp_path / "out"
    scale_by_chance(monkeypatch)
    options = QuantizeOptions(preset="fast", awq_scaling=is_scaled)  # type: ignore[arg-type]
    api.quantize(model, out, options, samples=samples_of(SAMPLES), device="cpu")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["conversion"]["calibration"]["awq_scaling"] is is_scaled
    decoded: list[str] = []
    decode = lut.decode

    def noted(checkpoint: Any, module: str, read: Any) -> Any:
        decoded.append(module)
        return decode(checkpoint, module, read)

    monkeypatch.setattr(lut, "decode", noted)
    before_v_and_up = {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.v_proj", "mlp.up_proj")}
    for said, expected in ((True, before_v_and_up), (REMOVE, before_v_and_up), (False, set())):
        edit_json(out / "config.json", "quantization_config", "conversion", "calibration", awq_scaling=said)
        decoded.clear()
        problems = api.verify(out, model).problems
        assert {module for module in decoded if decoded.count(module) > 1} == expected
        assert bool(problems) == (is_scaled and said is False)


def test_what_is_chosen_is_better(tmp_path: Path) -> None:
    """Where some inputs are much larger than others: the outputs of the layers behind the norms gain."""
    model = write_llama(tmp_path / "in", layers=1, hidden_size=256, num_attention_heads=4, num_key_value_heads=4)

    def uneven(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layernorm" in name:
                tensor[3::64] *= 32

    edit_tensors(model, uneven)
    found = []
    for is_scaled in (False, True):
        options = QuantizeOptions(tables="scale", preset="fast", awq_scaling=is_scaled)  # type: ignore[arg-type]
        out = tmp_path / str(is_scaled)
        found.append(api.quantize(model, out, options, samples=samples_of(SAMPLES), device="cpu"))
        assert api.verify(out, model).problems == ()
    for plain, scaled in zip(found[0].layers, found[1].layers, strict=True):
        if scaled.plan.module.rpartition(".")[2] in ("q_proj", "gate_proj"):
            assert scaled.notes["awq_exponent"] > 0
            assert scaled.notes["output_sqnr_db"] > plain.notes["output_sqnr_db"] + 1


def test_report_measures_what_was_scaled(tmp_path: Path) -> None:
    """The SQNR of a layer is that of its scaled weights."""
    model = write_gqa(tmp_path / "in")
    options = QuantizeOptions(tables="scale", preset="fast")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "awq_exponent", lambda w, e, m, tie=None: (torch.full_like(e.float(), 2.0), 0.5))  # noqa: ARG005
        api.quantize(model, tmp_path / "out", options, samples=samples_of(SAMPLES), device="cpu")
    norm = tensors_of(tmp_path / "out")["model.layers.0.input_layernorm.weight"]
    assert torch.equal(norm * 2, tensors_of(model)["model.layers.0.input_layernorm.weight"])
    report = api.make_report(tmp_path / "out", model)
    assert min(layer.sqnr_db["output"] for layer in report.layers) > 12


def test_places_by_name() -> None:
    """Llama's, and of a model whose attention and MLP get the same norm."""
    llama = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    llama += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm")]
    found = {fold.origin: fold.consumers for fold in find_folds("a.", [f"a.{name}" for name in llama])}
    assert found == {
        "a.input_layernorm": ("a.self_attn.k_proj", "a.self_attn.q_proj", "a.self_attn.v_proj"),
        "a.post_attention_layernorm": ("a.mlp.gate_proj", "a.mlp.up_proj"),
        "a.mlp.up_proj": ("a.mlp.down_proj",),
        "a.self_attn.v_proj": ("a.self_attn.o_proj",),
    }
    parallel = [name for name in llama if name != "post_attention_layernorm"]
    (first, *_) = find_folds("", parallel)
    assert set(first.consumers) == {f"self_attn.{x}_proj" for x in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    channels = origin_channels(4, 8, 2)
    assert channels is not None
    assert channels.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert origin_channels(4, 8, None) is None
    chooses = [*(f"a.{name}" for name in llama), "a.self_attn.indexer.wk"]  # it reads the first norm as well
    assert "a.input_layernorm" not in {fold.origin for fold in find_folds("a.", chooses)}


def test_only_what_is_written_is_taken_for_a_scale() -> None:
    """Scales are from 1/8 to 256, so that the other side gets 2^-8 to 8."""
    assert powers_of_two(torch.tensor([2.0**-8, 1.0, 8.0]))
    assert not any(powers_of_two(torch.tensor([1.0, wrong])) for wrong in (2.0**-9, 16.0, 2.0**12, 3.0, 0.0, -1.0))
