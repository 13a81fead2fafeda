"""The predicted error of new codes: against what the conversion of the whole then reports, and what it reads for it."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import pytest
import torch
from checkpoint_edits import edit_tensors, write_case
from click.testing import CliRunner
from factories import Case, Options
from factories.formats import Awq, CompressedTensors, Format, Gptq
from factories.layers import Scheme
from factories.models import Model, llama, qwen3_moe

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_tensor
from convert_w4a8.cli.convert import convert_command
from convert_w4a8.conversion import prediction
from convert_w4a8.conversion.plan import Plan, make_plan
from convert_w4a8.conversion.prediction import Prediction, kind_name, predict, sample
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.options import Options as PlanOptions
from convert_w4a8.options import Policy, ScalesMode
from convert_w4a8.verification.proof import verify

MEAN_DB, WORST_DB = 0.5, 2.0
"""How far a prediction may be from the figure; the worst layer of a sample is not the worst of all."""
MODES = pytest.mark.parametrize(
    ("output", "scales"),
    [("lut", "reference"), ("lut", "search"), ("lut", "direct"), ("compressed-tensors", "search")],
)


def plan_of(source: Path, output: str = "lut", scales: str = "search") -> Plan:
    """Plan a conversion that may choose new codes."""
    options = PlanOptions(output, ScalesMode(scales), act_order=Policy.REQUANTIZE, group_size=Policy.REQUANTIZE)
    return make_plan(open_checkpoint(source), options)


def predicted_and_reported(source: Path, out: Path, **choices: str) -> tuple[Prediction, list[float]]:
    """Return a prediction, and the SQNR of each layer with new codes as the conversion reports it."""
    plan = plan_of(source, **choices)
    found = predict(plan)
    assert found is not None
    result = carry_out(open_checkpoint(source), plan, out, device=torch.device("cpu"))
    return found, [stats.sqnr_db for _, stats in result.converted if not stats.codes_kept]


def check_close(found: Prediction, reported: list[float]) -> None:
    """Check what the documents promise."""
    assert found.layers == len(reported)
    assert found.mean_db == pytest.approx(fmean(reported), abs=MEAN_DB)
    assert found.worst.worst_db == pytest.approx(min(reported), abs=WORST_DB)


GENERATED: Mapping[str, Callable[[], tuple[Format, Model]]] = {
    "awq-zero-points": lambda: (Awq(Scheme(symmetric=False)), qwen3_moe()),
    "gptq-act-order": lambda: (Gptq(Scheme(act_order=True)), llama()),
    "gptq-32": lambda: (Gptq(Scheme(group_size=32)), llama()),
    "kimi-32": lambda: (CompressedTensors({"Linear": Scheme(group_size=32)}), qwen3_moe()),
    "ct-64": lambda: (CompressedTensors({"Linear": Scheme(group_size=64)}), qwen3_moe()),
}


@MODES
@pytest.mark.parametrize("name", GENERATED)
def test_a_sample_tells_what_the_conversion_reports(
    name: str, output: str, scales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few output channels of a few layers; more of such small ones would be read than are here."""
    form, model = GENERATED[name]()
    source = Case("", form, lambda: model, Options()).write(tmp_path / "in").path
    monkeypatch.setattr(prediction, "LAYERS", 14)
    monkeypatch.setattr(prediction, "LAYER_WEIGHTS", 1 << 14)
    found, reported = predicted_and_reported(source, tmp_path / "out", output=output, scales=scales)
    check_close(found, reported)


@MODES
@pytest.mark.parametrize("name", ["llama-31m-awq-zp", "tiny-llama-ct-asym", "tiny-mixtral-awq-zp"])
def test_real_checkpoints(name: str, output: str, scales: str, shared: Path, tmp_path: Path) -> None:
    """As tools wrote them."""
    check_close(*predicted_and_reported(shared / "models" / name, tmp_path / "out", output=output, scales=scales))


def test_each_kind_has_its_own_figures(tmp_path: Path) -> None:
    """Where the layers of one kind are other than the rest, their figures are theirs."""
    form, model = GENERATED["kimi-32"]()
    source = Case("", form, lambda: model, Options()).write(tmp_path / "in").path

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("down_proj.weight_scale"):
                tensor[:, ::4] *= 30  # one group of 32 in each of 128 is all that counts

    edit_tensors(source, spoil)
    plan = plan_of(source)
    found = predict(plan)
    assert found is not None
    result = carry_out(open_checkpoint(source), plan, tmp_path / "out", device=torch.device("cpu"))
    means = {}
    for kind in found.kinds:
        reported = [stats.sqnr_db for layer, stats in result.converted if kind_name(layer.module) == kind.kind]
        assert kind.layers == len(reported)
        assert kind.mean_db == pytest.approx(fmean(reported), abs=MEAN_DB)
        means[kind.kind] = fmean(reported)
    assert max(means, key=means.__getitem__) == "experts.down_proj"
    assert max(means.values()) - min(means.values()) > 3 * MEAN_DB


@pytest.mark.parametrize("name", ["gptq-v1", "awq-zero-points-all-8", "gptq-desc-act-trivial"])
def test_nothing_is_predicted_where_codes_are_kept(name: str, tmp_path: Path) -> None:
    """Neither where that is sure, nor where the small tensors say so."""
    assert predict(plan_of(write_case(name, tmp_path / "in").path)) is None


def test_a_damaged_layer_is_left_to_the_conversion(tmp_path: Path) -> None:
    """The others are measured; the plan is no place to find out about damage."""
    form, model = GENERATED["kimi-32"]()
    source = Case("", form, lambda: model, Options()).write(tmp_path / "in").path
    damaged = sample(plan_of(source))[0].spec.name
    edit_tensors(source, lambda tensors: tensors[f"{damaged}.weight_packed"].zero_())
    found = predict(plan_of(source))
    assert found is not None
    assert found.read == len(sample(plan_of(source))) - 1


def test_all_damaged_is_no_prediction(tmp_path: Path) -> None:
    """Nothing is said where nothing can be read."""
    form, model = GENERATED["kimi-32"]()
    source = Case("", form, lambda: model, Options()).write(tmp_path / "in").path
    edit_tensors(source, lambda tensors: [t.zero_() for name, t in tensors.items() if name.endswith("weight_packed")])
    assert predict(plan_of(source)) is None


def test_what_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many layers and bytes, one layer of each kind before another of any; larger ones are not read."""
    form, model = GENERATED["kimi-32"]()
    source = Case("", form, lambda: model, Options()).write(tmp_path / "in").path
    plan = plan_of(source)
    kinds = {kind_name(layer.module) for layer in plan.layers}
    assert len(sample(plan)) <= prediction.LAYERS
    assert len({layer.module for layer in sample(plan)}) == len(sample(plan))
    monkeypatch.setattr(prediction, "LAYERS", len(kinds))
    assert {kind_name(layer.module) for layer in sample(plan)} == kinds
    assert len(sample(plan)) == len(kinds)
    monkeypatch.setattr(prediction, "NBYTES", plan.layers[0].spec.nbytes)
    read: list[TensorInfo] = []

    def counted(info: TensorInfo) -> torch.Tensor:
        read.append(info)
        return read_tensor(info)

    monkeypatch.setattr(prediction, "read_tensor", counted)
    predict(plan)
    assert 0 < sum(info.nbytes for info in read) <= plan.layers[0].spec.nbytes
    monkeypatch.setattr(prediction, "NBYTES", 1)
    assert predict(plan) is None


def test_a_prediction_is_always_the_same(tmp_path: Path) -> None:
    """Two plans of the same checkpoint say the same."""
    form, model = GENERATED["awq-zero-points"]()
    source = Case("", form, lambda: model, Options()).write(tmp_path / "in").path
    assert predict(plan_of(source)) == predict(plan_of(source))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.17.down_proj", "experts.down_proj"),
        ("transformer.h.0.c_proj", "h.c_proj"),
        ("lm_head", "lm_head"),
        ("0.1", "1"),
    ],
)
def test_kinds_have_the_end_of_a_name_without_numbers(module: str, kind: str) -> None:
    """However short a name is."""
    assert kind_name(module) == kind


def test_kimi_k2_is_refused_without_the_option_and_converted_with_it(shared: Path, tmp_path: Path) -> None:
    """Groups of 32, by request; what the plan says of the loss is what the conversion reports."""
    source = tmp_path / "in"
    case = shared / "cases" / "32-kimi-k2-group32.py"
    subprocess.run([sys.executable, str(case), str(source)], check=True)
    refused = CliRunner().invoke(convert_command, [str(source), str(tmp_path / "out")])
    assert refused.exit_code == 1
    assert "--group-size requantize" in refused.stderr
    assert not (tmp_path / "out").exists()
    check_close(*predicted_and_reported(source, tmp_path / "out"))
    assert not verify(open_checkpoint(tmp_path / "out"), open_checkpoint(source)).problems


def invoke(*arguments: object) -> str:
    """Run the conversion's command, which has to succeed; return stdout."""
    result = CliRunner().invoke(convert_command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_plan_and_result_say_it_in_the_same_words(tmp_path: Path) -> None:
    """In the text of a dry run and of a conversion, in both documents, and not where nothing is printed."""
    form, model = GENERATED["kimi-32"]()
    source = Case("", form, lambda: model, Options()).write(tmp_path / "in").path
    arguments = (source, tmp_path / "out", "--group-size", "requantize")
    document = json.loads(invoke(*arguments, "--dry-run", "--json"))["predicted"]
    text = invoke(*arguments, "--dry-run")
    figures = f"mean SQNR {document['mean_sqnr_db']:.1f} dB, worst {document['worst_sqnr_db']:.1f} dB"
    line = f"predicted  new INT4 codes of {document['layers']} layers: {figures} ({document['worst']})"
    assert f"{line}, from a sample of {document['layers_read']}\n" in text
    assert line in invoke(*arguments)
    result = json.loads(invoke(*arguments, "--overwrite", "--json"))
    assert result["plan"]["predicted"] == document
    check_document(document, [layer["estimated_sqnr_db"] for layer in result["layers"] if not layer["codes_kept"]])


def check_document(document: Mapping[str, float], reported: list[float]) -> None:
    """Check a document's prediction against what was reported."""
    assert document["layers"] == len(reported)
    assert document["mean_sqnr_db"] == pytest.approx(fmean(reported), abs=MEAN_DB)
    assert document["worst_sqnr_db"] == pytest.approx(min(reported), abs=WORST_DB)


def test_there_is_no_prediction_in_the_document_where_codes_are_kept(tmp_path: Path) -> None:
    """The key is there, and null."""
    source = write_case("gptq-v1", tmp_path / "in").path
    assert json.loads(invoke(source, tmp_path / "out", "--dry-run", "--json"))["predicted"] is None
