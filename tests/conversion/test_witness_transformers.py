"""transformers and compressed-tensors run what we write: their logits are those of our own decoding.

They see the `compressed-tensors` output as W4A16 weights with BF16 scales (activation quantization is turned off);
we decode what the tensor core multiplies by, with FP8 scales. The two differ by the error that `w4a8 verify` reports.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.quantization.lifecycle.helpers import disable_quantization
from factories.layers import dequantize, unpack_columns, unpack_rows
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.encoding import tables
from convert_w4a8.targets import find_target
from convert_w4a8.targets.base import Target

pytestmark = pytest.mark.slow

MODELS = ("llama-31m-gptq", "llama-31m-awq-zp", "llama-31m-ct")


@dataclass(frozen=True)
class Witness:
    """A real checkpoint in both output formats; logits [tokens, vocabulary] of some held-out text by transformers.

    weights: module → the weight that compressed-tensors decompressed, bfloat16 [N, K].
    """

    source: Path
    outputs: Mapping[str, Path]
    tokens: torch.Tensor
    logits: torch.Tensor
    weights: Mapping[str, torch.Tensor]


@pytest.fixture(scope="module", params=MODELS)
def witness(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Witness:
    """Convert a trained Llama and run the stock output in transformers, activations unquantized."""
    source = shared / "models" / request.param
    outputs = {name: tmp_path_factory.mktemp("witness") / name for name in ("lut", "compressed-tensors")}
    for name, out in outputs.items():
        arguments = [str(source), str(out), "--format", name, "--scales", "reference", "--quiet"]
        result = CliRunner().invoke(convert, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    stock = outputs["compressed-tensors"]
    text = (shared / "models" / "heldout_text.txt").read_text(encoding="utf-8").split("\0")[0]
    tokens = AutoTokenizer.from_pretrained(stock)(text, return_tensors="pt")["input_ids"][:, :256]
    assert tokens.shape == (1, 256)
    model = AutoModelForCausalLM.from_pretrained(stock, dtype="auto")
    assert model.dtype == torch.bfloat16
    model.apply(disable_quantization)
    logits = _logits(model, tokens)
    weights = {name: m.weight.detach() for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    return Witness(source, outputs, tokens, logits, weights)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits[0].float()
    return logits


def _our_logits(out: Checkpoint, target: Target, tokens: torch.Tensor) -> torch.Tensor:
    """Put what we decode from an output into an ordinary BF16 model and run it."""
    modules = target.find_layers(out)
    parts = {name for name in out.tensors if name.rpartition(".")[0] in modules}
    state = {name: read_tensor(info) for name, info in out.tensors.items() if name not in parts}
    for module in modules:
        state[f"{module}.weight"] = tables.decode(target.decode(out, module, read_tensor)).bfloat16()
    config = AutoConfig.from_pretrained(out.root)
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return _logits(model, tokens)


def _sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Nats per token."""
    return float(torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]))


@pytest.mark.parametrize("name", ["lut", "compressed-tensors"])
def test_logits_agree_with_ours(witness: Witness, name: str) -> None:
    """The logits differ by no more than the weights do, and the loss on real text stays what it is."""
    path = witness.outputs[name]
    result = CliRunner().invoke(main, ["verify", str(path), "--source", str(witness.source), "--json"])
    assert result.exit_code == 0, result.output
    worst = min(layer["sqnr_db"] for layer in json.loads(result.stdout)["layers"])
    out = open_checkpoint(path)
    ours = _our_logits(out, find_target(out), witness.tokens)
    # The noise of 28 layers adds up along the residual stream and is averaged in every product: about even.
    assert _sqnr_db(ours, witness.logits) > worst - 3
    assert _loss(witness.logits, witness.tokens) < 2.5
    assert _loss(ours, witness.tokens) == pytest.approx(_loss(witness.logits, witness.tokens), abs=0.03)


@pytest.mark.parametrize("witness", ["llama-31m-gptq"], indirect=True)
def test_decompressed_weights_are_those_of_the_gptq_file(witness: Witness) -> None:
    """compressed-tensors decompresses our output to the source's codes times its scales in BF16, bit for bit."""
    source = load_file(witness.source / "model.safetensors")
    assert len(witness.weights) == 4 * 7
    for module, weight in witness.weights.items():
        zeros = source[f"{module}.qzeros"].numpy().view(np.uint32) + np.uint32(0x11111111)
        expected = dequantize(
            unpack_rows(source[f"{module}.qweight"].numpy()).T,
            unpack_columns(zeros.view(np.int32)),
            source[f"{module}.scales"].bfloat16(),
            source[f"{module}.g_idx"].numpy(),
        )
        assert torch.equal(weight, torch.from_numpy(expected).bfloat16()), module
