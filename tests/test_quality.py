"""The scripts that measure quality: divergence and its errors, the emulation, calibration text."""

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file

from convert_w4a8 import api
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.tables import decode, gemm
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import grouped_reference
from convert_w4a8.linear import DenseLinear, W4A8Linear
from convert_w4a8.options import Options, ScalesMode
from convert_w4a8.quantization.layer import to_w4a8
from convert_w4a8.targets import lut

pytest.importorskip("transformers")
sys.path.append(str(ROOT / "scripts" / "quality"))
import compare_kl
import divergence
import emulation
import make_calibration
import make_rivals
import make_trained_moe
import results
from transformers import AutoModelForCausalLM

TEXT = ("def f(x):\n    return x + 1\n" * 60 + "\0") * 4


def row(name: str, kind: str, activations: str, values: Sequence[float]) -> divergence.Row:
    """Return a row with these divergences of windows."""
    kl = torch.tensor(values, dtype=torch.float64)
    return divergence.score(name, kind, activations, divergence.Windows(kl, kl, kl), kl)


def test_divergence_is_that_of_the_formula() -> None:
    """By hand, for distributions of three tokens; logits are the same up to a constant."""
    base, ours = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    found = divergence.compare_logits(
        ours.log().expand(2, 3, 3) + 7, base.log().expand(2, 3, 3), torch.tensor([[0, 1, 2], [0, 0, 0]])
    )
    assert found.kl.tolist() == pytest.approx([0.25 * math.log(2)] * 2, abs=1e-6)
    assert found.loss.tolist() == pytest.approx([math.log(4 * 2 * 4) / 3, math.log(4)], rel=1e-6)
    assert found.same.tolist() == [0, 0]
    with pytest.raises(ValueError, match="not the same vocabulary"):
        divergence.compare_logits(ours.expand(2, 3, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))


def test_differences_are_paired_by_window() -> None:
    """What every window has in common is no error of the difference; the reference is the closest in 16 bits."""
    rows = divergence.merge(
        [],
        [
            row("model", "BF16", "fp8", [0, 0, 0]),
            row("far", "W4A16", "bf16", [2, 4, 9]),
            row("near", "W4A16", "fp16", [1, 3, 8]),
            row("nearest", "W4A16", "fp8", [0, 0, 0]),
            row("ours", "W4A8 lut", "fp8", [0.5, 2.5, 7.5]),
        ],
    )
    assert rows[4]["kl_difference"] == pytest.approx(-0.5)
    assert rows[4]["kl_difference_standard_error"] == pytest.approx(0, abs=1e-12)
    assert rows[1]["kl_standard_error"] == pytest.approx(math.sqrt(13 / 3))
    assert ["kl_difference" in each for each in rows] == [False, True, False, True, True]


def test_appended_rows_replace_those_of_the_same_name() -> None:
    """And differences are counted anew where a closer rival came."""
    before = divergence.merge([], [row("a", "W4A16", "bf16", [1, 1]), row("ours", "W4A8 lut", "fp8", [2, 2])])
    rows = divergence.merge(before, [row("b", "W4A16", "bf16", [0.5, 0.5]), row("ours", "W4A8 lut", "fp8", [3, 3])])
    assert [(each["weights"], each["kl"], each.get("kl_difference")) for each in rows] == [
        ("a", 1, 0.5),
        ("b", 0.5, None),
        ("ours", 3, 2.5),
    ]


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (None, "BF16"),
        ({"quant_method": "gptq"}, "W4A16"),
        ({"quant_method": "w4a8_lut"}, "W4A8 lut"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"input_activations": None}}}, "W4A16"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"input_activations": {"num_bits": 8}}}},
            "W4A8 compressed-tensors",
        ),
    ],
)
def test_kinds(block: dict[str, object] | None, kind: str) -> None:
    """Only activations of eight bits make W4A8."""
    assert divergence.kind_of(block) == kind


def test_a_layer_is_what_the_kernel_computes() -> None:
    """FP8 activations and decoded weights: `tables.gemm`, to the rounding of float32; in 16 bits torch's product."""
    torch.manual_seed(0)
    w4a8: W4A8Linear = to_w4a8(DenseLinear(torch.randn(128, 256)), ScalesMode.DIRECT)[0]
    weight, x = decode(w4a8), torch.randn(2, 5, 256).bfloat16()
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(256, 128, bias=False)])})
    (layer,) = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    layer.weight.data = weight
    with torch.no_grad(), emulation.Emulation(model, fp8=True):
        y = layer(x)
        torch.testing.assert_close(y.flatten(0, 1), gemm(x.flatten(0, 1), w4a8), rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(layer(x * 2), y * 2, rtol=0, atol=0)
        x[0] = 0  # the same tensor with other contents
        assert not layer(x)[0].any()
    with torch.no_grad(), emulation.Emulation(model, fp8=False):
        assert torch.equal(layer(x), (x.float() @ weight.t()).bfloat16())


def test_experts_get_their_own_weights(shared: Path) -> None:
    """One module holds all experts of a block in two tensors, which are FP8 layers too; the router is not."""
    contents = emulation.read_contents(shared / "models" / "tiny-qwen3moe-gptq")
    model = emulation.build_model(contents, torch.bfloat16)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    gate, up = (contents.layers[f"model.layers.1.mlp.experts.5.{name}_proj"] for name in ("gate", "up"))
    assert torch.equal(experts.get_parameter("gate_up_proj")[5], torch.cat((gate, up)))
    down = contents.layers["model.layers.1.mlp.experts.5.down_proj"]
    assert torch.equal(experts.get_parameter("down_proj")[5], down)
    layers = len({name.split(".")[2] for name in contents.layers})
    assert len(list(emulation.emulated_weights(model))) == layers * (4 + 2)
    assert model.get_parameter("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16
    ids = torch.arange(32)[None]
    with torch.no_grad():
        logits = []
        for fp8 in (False, True):
            with emulation.Emulation(model, fp8=fp8):
                logits.append(model(input_ids=ids).logits)
    assert not torch.equal(*logits)


def test_experts_quantize_their_inputs_as_the_kernels_do(tmp_path: Path) -> None:
    """A token's states once for all of its experts, and what lies between gate, up and down; routers see 16 bits."""
    model = emulation.build_model(emulation.read_contents(tiny_models.write_mixtral(tmp_path / "m")), torch.bfloat16)
    block = model.get_submodule("model.layers.0.mlp")
    experts = block.get_submodule("experts")
    torch.manual_seed(0)
    x = torch.randn(1, 24, 256).bfloat16()
    with torch.no_grad(), emulation.Emulation(model, fp8=True):
        found = block(x)[0]
        _, weights, chosen = block.get_submodule("gate")(x)
    expected = torch.zeros(x.shape[1:])
    for token in range(24):
        tokens, scale = quantize_tokens(x[0, token : token + 1])
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            both = experts.get_parameter("gate_up_proj")[expert] @ tokens[0].float() * scale
            gate, up = both.bfloat16().chunk(2, dim=-1)
            between = grouped_reference.activate(gate, up, "silu")
            second, rescale = quantize_tokens(between)
            down = experts.get_parameter("down_proj")[expert] @ second[0].float() * rescale
            expected[token] += (weight * down.bfloat16().float()[0]).detach()
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=float(expected.std()) * 2**-6)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return the directory of a tiny Llama, without a tokenizer."""
    return tiny_models.write_llama(tmp_path / "llama")


def test_a_mixture_starts_with_its_llama(llama: Path) -> None:
    """The two experts that have all neurons between them compute the MLP where routing weighs them alike."""
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    mixture: Any = make_trained_moe.upcycle(str(llama), 4, 0)
    mixture.float()
    for layer in mixture.model.layers:
        layer.mlp.gate.weight.data[:2], layer.mlp.gate.weight.data[2:] = 1e-3, -1e-3
    states = torch.randn(2, 5, dense.config.hidden_size).abs()  # so that routers choose the first two
    for old, new in zip(dense.model.layers, mixture.model.layers, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(new.mlp(states), old.mlp(states), rtol=1e-3, atol=1e-5)
    slow = mixture.model.layers[0].mlp.experts
    flat, index, routing = states.flatten(0, 1), torch.tensor([[0, 3]] * 10), torch.tensor([[0.7, 0.3]] * 10)
    with torch.no_grad():
        together = make_trained_moe.all_experts(slow, flat, index, routing)
        torch.testing.assert_close(together, slow(flat, index, routing), rtol=1e-4, atol=1e-6)


def test_what_training_added_comes_back(llama: Path) -> None:
    """Experts to half a step, routers as they are."""
    before, after = (make_trained_moe.upcycle(str(llama), 4, 0) for _ in range(2))
    old = {name: each.detach().clone() for name, each in make_trained_moe.trained_weights(before).items()}
    for parameter in make_trained_moe.trained_weights(after).values():
        parameter.data = parameter.data.float() + 0.01 * torch.randn(parameter.shape)
    new = {name: each.detach().clone() for name, each in make_trained_moe.trained_weights(after).items()}
    difference = make_trained_moe.find_difference(old, new)
    make_trained_moe.add_difference(before, difference)
    for name, each in make_trained_moe.trained_weights(before).items():
        room = 0.51 * difference[f"{name}.step"] if ".experts." in name else 0
        assert ((each.float() - new[name]).abs() <= room + new[name].abs() * 2**-8).all()


def test_experts_get_the_names_that_vllm_knows(tmp_path: Path) -> None:
    """In tensors and in the configuration; other models stay as they are."""
    config = {"model_type": "mixtral", "quantization_config": {"ignore": ["model.layers.0.mlp.gate", "lm_head"]}}
    names = {
        "mlp.experts.1.gate_proj.qweight": "w1.qweight",
        "block_sparse_moe.experts.1.down_proj.scales": "w2.scales",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"model.layers.0.{name}": torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    make_rivals.name_experts(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == {f"model.layers.0.block_sparse_moe.experts.1.{name}" for name in names.values()}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"]["ignore"] == ["model.layers.0.block_sparse_moe.gate", "lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    make_rivals.name_experts(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == found.keys()


@pytest.mark.parametrize("form", ["lut", "compressed-tensors"])
def test_outputs_are_read_as_the_tensor_core_sees_them(shared: Path, tmp_path: Path, form: str) -> None:
    """And everything else of them is the source's."""
    source = shared / "models" / "tiny-llama-ct-asym"
    api.convert(source, tmp_path / "out", Options(format=form))
    found, before = emulation.read_contents(tmp_path / "out"), emulation.read_contents(source)
    assert (found.kind, before.kind) == (f"W4A8 {form}", "W4A16")
    assert found.layers.keys() == before.layers.keys()
    assert found.rest.keys() == before.rest.keys()
    name = next(iter(found.layers))
    if form == "lut":
        expected = decode(lut.decode(open_checkpoint(tmp_path / "out"), name, read_tensor))
        assert torch.equal(found.layers[name], expected)
    noise = (found.layers[name] - before.layers[name]).square().sum() / before.layers[name].square().sum()
    assert 0 < noise < 0.01


def test_a_run_is_a_table(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights diverge by nothing, FP8 activations by something; rows are added only to the same text's."""
    model, text = shared / "models" / "tiny-llama-ct-asym", tmp_path / "text.txt"
    text.write_text(TEXT)

    def run(*arguments: str) -> int:
        command = ["compare_kl.py", str(model), *arguments, "--text", str(text), "--window", "64", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "out.json")])
        return compare_kl.main()

    assert run(f"same={model}", "--tokens", "256") == 0
    assert run(f"same={model}@fp8", "--tokens", "256", "--append") == 0
    document = json.loads((tmp_path / "out.json").read_text())
    base, same, fp8 = document["rows"]
    assert (same["kl"], same["agreement"], same["perplexity"]) == (0, 1, base["perplexity"])
    assert 0 < fp8["kl"] == pytest.approx(fp8["kl_difference"], rel=1e-3)
    assert len(fp8["kl_by_window"]) == document["settings"]["windows"] == 4
    assert document["command"].count("compare_kl.py") == 2
    with pytest.raises(SystemExit, match=r"has windows 4, not 2: rows of both do not compare"):
        run(f"same={model}", "--tokens", "128", "--append")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    capsys.readouterr()
    assert run(f"other={other}", "--tokens", "128") == 1
    assert "other: " in capsys.readouterr().err


def test_candidates() -> None:
    """A name, a directory, activations: only the directory has to be there."""
    parse = compare_kl.Candidate.parse
    assert parse(f"{ROOT}") == compare_kl.Candidate(ROOT.name, ROOT, ())
    assert parse(f"a={ROOT}@bf16,fp8") == compare_kl.Candidate("a", ROOT, ("bf16", "fp8"))
    with pytest.raises(Exception, match="no such directory"):
        parse(f"a={ROOT}@fp4")


def test_merged_rows_keep_commands_and_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike rows that extend a file, they may be of several commits."""
    path = tmp_path / "a.json"
    for name in ("one", "two", "two"):
        monkeypatch.setattr(results, "commit", lambda name=name: name)
        results.write_results(path, "What?", [{"a": 1}], merged=True)
    document = json.loads(path.read_text())
    assert document["commit"] == "one, two"
    assert len(document["command"].splitlines()) == 3
    assert document["rows"] == [{"a": 1}]


class Characters:
    """A tokenizer of characters."""

    def encode(self, text: str) -> list[int]:
        """Return a token for each character."""
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return a character for each token."""
        return "".join(map(chr, ids))


def test_calibration_windows() -> None:
    """As many as asked for, the same for the same seed, none twice, each long enough by itself."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh \n", k=size)) for size in (5, 40, 300, 5000, 5000)]
    windows = make_calibration.windows_of(texts, Characters(), 5, 32, 2, 0)
    assert windows == make_calibration.windows_of(texts, Characters(), 5, 32, 2, 0)
    assert windows != make_calibration.windows_of(texts, Characters(), 5, 32, 2, 1)
    assert len(set(windows)) == 5
    assert {len(window) for window in windows} == {32}
    assert all(any(window in text for text in texts) for window in windows)
    with pytest.raises(ValueError, match="only 7 windows of 32 tokens, not 99"):
        make_calibration.windows_of(texts, Characters(), 99, 32, 2, 0)


def test_files_that_stand_in_evaluation_text_are_left_out() -> None:
    """By their longer lines; and n-grams that are in both are counted."""
    lines = [f"this is line number {i} of the file that is used" for i in range(40)]
    others = [f"that was line number {i} of another file, of course" for i in range(40)]
    texts = ["\n".join(lines), "\n".join(others), "\n".join([*others[:39], lines[0]]), "short"]
    assert make_calibration.unlike(texts, ["\0".join(lines)], 0.02) == [texts[1]]
    assert make_calibration.unlike(texts, ["\0".join(lines)], 0.03) == texts[1:3]
    assert make_calibration.overlap([[1, 2, 3, 4], [3, 4]], [0, 2, 3, 4], 2) == (3, 4)
