"""The scripts that drive vLLM's engines on a GPU, with a stand-in for vLLM, on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT

from convert_w4a8.encoding.packing import unpack_codes
from convert_w4a8.kernels.gemm import reference
from convert_w4a8.linear import Packing

sys.path.append(str(ROOT / "scripts" / "bench"))
sys.path.append(str(ROOT / "scripts" / "checkpoints"))
sys.path.append(str(ROOT / "scripts" / "gpu"))
import bench_decode
import bench_serving
import contestants
import few_humming
import gaps
import make_random_checkpoint
import random_layers

SERVING = '''
import os
from types import SimpleNamespace


class SamplingParams:
    def __init__(self, **settings):
        self.tokens = settings["max_tokens"]


class LLM:
    """Ours takes half the time; the last request starts 1 s late."""

    def __init__(self, model, **settings):
        if settings.get("quantization") == "humming" and "VLLM_HUMMING_INPUT_QUANT_CONFIG" not in os.environ:
            raise RuntimeError("no humming here")
        print("Using SomeKernel for CompressedTensorsWNA16")
        self.time = 0.5 if model.endswith("lut") and "W4A8_LUT_DECODE" not in os.environ else 1.0

    def generate(self, prompts, params, use_tqdm):
        last = len(prompts) - 1
        return [SimpleNamespace(metrics=self._metrics(i == last, params.tokens)) for i in range(len(prompts))]

    def _metrics(self, late, tokens):
        first = 2.0 if late else 1.0
        return SimpleNamespace(
            scheduled_ts=0.0,
            first_token_latency=self.time,
            first_token_ts=first,
            last_token_ts=first + self.time * (tokens - 1) * (1 if late else 2),
        )
'''


def serve(tmp_path: Path, *arguments: str) -> "tuple[subprocess.CompletedProcess[str], dict[str, Any]]":
    """Run bench_serving.py on a tiny model and return its JSON."""
    site = tmp_path / "site" / "vllm"
    site.mkdir(parents=True, exist_ok=True)
    (site / "__init__.py").write_text(SERVING)
    command = [sys.executable, str(ROOT / "scripts" / "gpu" / "bench_serving.py"), "--model", "tiny", "--seconds", "0"]
    command += ["--dir", str(tmp_path / "dir"), "--cases", "1x16", "4x8", "--json", str(tmp_path / "out"), *arguments]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (tmp_path / "out").is_file(), done.stdout + done.stderr
    return done, json.loads((tmp_path / "out").read_text())


@pytest.mark.slow
def test_serving_is_compared_over_several_calls(tmp_path: Path) -> None:
    """A kind that fails does not end the run; --extend adds what is missing, with gains over the first kind."""
    done, document = serve(tmp_path, "--kinds", "w4a16", "w4a16-humming", "lut")
    assert done.returncode == 1
    assert "no humming here" in done.stdout
    assert [(row["kind"], row["batch"]) for row in document["rows"]] == [
        ("w4a16", 1),
        ("w4a16", 4),
        ("lut", 1),
        ("lut", 4),
    ]
    done, document = serve(tmp_path, "--kinds", "w4a16", "w4a8-humming", "lut:cutlass", "--extend")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "w4a16: in the file already" in done.stdout
    rows = {(row["kind"], row["batch"]): row for row in document["rows"]}
    assert [kind for kind, batch in rows if batch == 1] == ["w4a16", "lut", "w4a8-humming", "lut:cutlass"]
    assert rows["lut", 4]["tpot_gain"] == pytest.approx(1)
    assert rows["lut:cutlass", 4]["tpot_gain"] == pytest.approx(0)
    assert "tpot_gain" not in rows["w4a16", 4]
    assert rows["lut", 4]["step_ms"] == pytest.approx(500)
    assert rows["lut", 4]["tpot_ms"] == pytest.approx(875)
    assert rows["lut", 4]["prefill_ms"] == pytest.approx(2000)
    assert document["settings"]["kernels"]["lut"] == ["Using SomeKernel for CompressedTensorsWNA16"]
    assert set(document["settings"]["kernels"]) == {"w4a16", "lut", "w4a8-humming", "lut:cutlass"}
    assert len(document["command"].splitlines()) == 2


def test_times_of_requests() -> None:
    """The request that starts last has steps without prefill; the mean has all of them."""
    stats = [
        SimpleNamespace(scheduled_ts=1.0, first_token_latency=0.5, first_token_ts=2.0, last_token_ts=5.0),
        SimpleNamespace(scheduled_ts=2.0, first_token_latency=1.5, first_token_ts=3.0, last_token_ts=4.0),
    ]
    found = bench_serving.request_times(stats, 11)
    assert found == pytest.approx({"ttft_ms": 1000, "prefill_ms": 2000, "tpot_ms": 200, "step_ms": 100})


def test_runs_are_summed_up() -> None:
    """Medians; the times to the first token also of the runs for it alone, with the fastest tenth."""
    run = dict.fromkeys((*bench_serving.TIMES, "batch_s"), 1.0)
    firsts = [run | {"ttft_ms": float(i), "tpot_ms": 99.0} for i in range(2, 12)]
    found = bench_serving.summary([run], firsts)
    assert (found["ttft_ms"], found["ttft_p10_ms"], found["tpot_ms"], found["runs"]) == (6, 2, 1, 1)


SCORES = '''
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace


class SamplingParams:
    def __init__(self, **settings):
        self.tokens = settings["max_tokens"]


class LLM:
    """Log-probabilities differ a little by path, for our kernel by what GAP says; greedy tokens are 7, 7, ..."""

    def __init__(self, model, max_num_seqs, max_num_batched_tokens, long_prefill_token_threshold=0, **settings):
        decode = long_prefill_token_threshold == 1
        assert not decode or max_num_batched_tokens == max_num_seqs
        ours = decode and Path(model).name != "stock" and "W4A8_LUT_DECODE" not in os.environ
        self.shift = 0.01 * decode + float(os.environ["GAP"]) * ours + (Path(model).name == "damaged")

    def generate(self, prompts, params, use_tqdm):
        return [self._output(prompt["prompt_token_ids"], params.tokens) for prompt in prompts]

    def _output(self, prompt, tokens):
        entries = [self._entry(token, i) for i, token in enumerate(prompt)]
        new = SimpleNamespace(token_ids=[7] * tokens, logprobs=[self._entry(7, i) for i in range(tokens)])
        return SimpleNamespace(prompt_logprobs=[None, *entries[1:]], outputs=[new])

    def _entry(self, token, i):
        return {token: SimpleNamespace(logprob=-1 - self.shift * (1 if token % 2 else -1), rank=1)}
'''


def run(tmp_path: Path, script: str, *arguments: str, gap: float) -> "subprocess.CompletedProcess[str]":
    """Run a script on tiny checkpoints lut and stock; our decode kernel deviates by `gap`."""
    site = tmp_path / "site" / "vllm"
    site.mkdir(parents=True, exist_ok=True)
    (site / "__init__.py").write_text(SCORES)
    make_random_checkpoint.ensure("tiny", tmp_path)
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": paths, "GAP": str(gap)}
    command = [sys.executable, str(ROOT / "scripts" / "gpu" / script), *arguments, "--json", str(tmp_path / "out")]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("gap", "code"), [(0.003, 0), (0.05, 1)])
def test_the_decode_kernel_may_deviate_as_stock_does_from_itself(tmp_path: Path, gap: float, code: int) -> None:
    """By decode and by prefill, stock differs by 0.01."""
    pair = [str(tmp_path / "tiny-2" / kind) for kind in ("lut", "stock")]
    done = run(tmp_path, "check_equivalence.py", *pair, "--decode", "--quick", "--prompt-tokens", "16", gap=gap)
    assert done.returncode == code, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "out").read_text())["rows"]}
    assert rows["damaged, without decode kernel"]["mean_gap"] == pytest.approx(1 + gap)
    assert rows["plugin without decode kernel, stock"]["identical"]
    assert rows["stock by decode, by prefill"]["mean_gap"] == pytest.approx(0.01)
    assert rows["plugin, without decode kernel"]["mean_gap"] == pytest.approx(gap)


@pytest.mark.slow
def test_several_tensor_parallel_sizes(tmp_path: Path) -> None:
    """What stock differs from itself is measured once, at size 1; the kernel at each of the others."""
    pair = [str(tmp_path / "tiny-2" / kind) for kind in ("lut", "stock")]
    options = ["--decode", "--quick", "--no-damage", "--prompt-tokens", "16", "--tp", "2", "4", "--first-gpu", "2"]
    done = run(tmp_path, "check_equivalence.py", *pair, *options, gap=0.003)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [(row["tp"], row["own"]) for row in json.loads((tmp_path / "out").read_text())["rows"]]
    assert rows == [(1, True), (2, False), (4, False)]


@pytest.mark.slow
def test_the_plugin_is_compared_with_stock_without_its_decode_kernel(tmp_path: Path) -> None:
    """Where it has the same kernel as stock, the same bytes are asked for."""
    pair = [str(tmp_path / "tiny-2" / kind) for kind in ("lut", "stock")]
    done = run(tmp_path, "check_equivalence.py", *pair, "--quick", "--prompt-tokens", "16", gap=9)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "out").read_text())["rows"]
    assert (row["what"], row["identical"]) == ("plugin, stock", True)


@pytest.mark.slow
def test_perplexity_by_both_paths(tmp_path: Path) -> None:
    """The differences between decode and prefill are each checkpoint's own."""
    (tmp_path / "tokens").write_text(json.dumps(list(range(256))))
    pair = [f"{kind}={tmp_path / 'tiny-2' / kind}" for kind in ("stock", "lut")]
    options = ["--tokens-file", str(tmp_path / "tokens"), "--window", "32", "--path", "prefill", "decode"]
    done = run(tmp_path, "eval_vllm_perplexity.py", *pair, *options, gap=0.02)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["checkpoint"], row["path"]): row for row in json.loads((tmp_path / "out").read_text())["rows"]}
    assert rows["stock", "prefill"]["nats_per_token"] == 0
    odd = 16 / 31  # of 31 tokens, these are odd
    assert rows["stock", "decode"]["nats_over_prefill"] == pytest.approx(0.01 * (2 * odd - 1), rel=1e-4)
    assert rows["lut", "decode"]["nats_over_prefill"] == pytest.approx(0.03 * (2 * odd - 1), rel=1e-4)
    assert rows["lut", "decode"]["nats_per_token"] == pytest.approx(0.03 * (2 * odd - 1), rel=1e-4)
    assert "nats_over_prefill" not in rows["lut", "prefill"]


class _Operators:
    """vLLM's operators as the decode benchmark calls them, in torch. Marlin is wrong, and Machete is not here."""

    @staticmethod
    def dynamic_per_token_scaled_fp8_quant(tokens: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, _: None) -> None:
        scale.copy_(x.float().abs().amax(1, keepdim=True) / 448)
        tokens.copy_((x.float() / scale).to(torch.float8_e4m3fn))

    @staticmethod
    def cutlass_w4a8_mm(x: torch.Tensor, shown: torch.Tensor, tables: torch.Tensor, *more: Any) -> torch.Tensor:
        _, channel, scale, *_ = more
        k, n = 8 * shown.shape[0], shown.shape[1]
        packed = shown.t().contiguous().view(k // 32, 4 * n)
        return reference.gemm(x, scale, packed, tables.view(-1, n, 8), channel.view(-1))


def test_decode_race(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Times before and with quantization, errors against float64; who is wrong or absent has a reason and no time."""

    def gemm(tokens: torch.Tensor, scale: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        packed, tables, channel, *_ = weights
        k, n = 8 * packed.shape[0], packed.shape[1]
        return reference.gemm(tokens, scale, packed.view(k // 32, 4 * n), tables.view(-1, n, 8), channel)

    def wrong(layers: random_layers.Layers, _: Any) -> contestants.Prepared:
        right = contestants.bf16(layers)
        return contestants.Prepared(lambda x: 2 * right.exact(x), right.whole)

    monkeypatch.setattr(contestants, "vllm_ops", lambda: _Operators)
    monkeypatch.setattr("convert_w4a8.vllm_plugin.gemm.gemm", gemm)
    monkeypatch.setattr(bench_decode, "bytes_per_microsecond", lambda: 1000.0)
    monkeypatch.setattr(bench_decode, "microseconds", lambda calls, least: float(len(calls) + 0 * least))
    monkeypatch.setitem(contestants.CONTESTANTS, "marlin", wrong)
    reasons: dict[str, str] = {}
    layers = random_layers.Layers(128, 256, 3, device="cpu")
    rows = bench_decode.compare(layers, (1, 5), ("ours", "cutlass", "machete", "marlin", "bf16"), reasons)
    assert [row["m"] for row in rows] == [1, 5]
    for row in rows:
        assert {name for name in row if name.endswith("_us")} == {
            *("floor_us", "ours_before_us", "ours_us", "cutlass_before_us", "cutlass_us", "bf16_us")
        }
        assert row["ours_error"] < 0.004
        assert (row["best_peer"], row["gain"]) == ("cutlass", 0)
        assert row["bandwidth"] == pytest.approx((128 * 256 / 2 + 128 * 256 / 128) / 1000 / 3)
    assert set(reasons) == {"machete 128x256", "marlin 128x256 M=1", "marlin 128x256 M=5"}
    assert reasons["marlin 128x256 M=5"].endswith("is more than 0.01")
    assert "+0% over cutlass" in capsys.readouterr().out


def test_w4a16_layers_are_as_compressed_tensors_packs_them() -> None:
    """The benchmark's own unpacking, by the converter's."""
    layers = random_layers.Layers(32, 256, 1, device="cpu")
    codes = unpack_codes(layers.words[0], Packing.PACK_QUANTIZED).float() - 8
    scales = layers.scales.float().repeat_interleave(128, 1)
    assert layers.w4a16_weights.equal(codes.view(32, 256) * scales)


def test_the_picture_of_the_decode_benchmark(tmp_path: Path) -> None:
    """Layers in the order of their size, those that a kernel was measured on; a PNG comes out."""
    pytest.importorskip("matplotlib")
    rows = [
        {"n": 64, "k": 256, "m": 1, "floor_us": 4.0, "ours_us": 8.0, "cutlass_us": 16.0},
        {"n": 64, "k": 128, "m": 1, "floor_us": 1.0, "ours_us": 10.0},
        {"n": 64, "k": 128, "m": 16, "floor_us": 1.0, "ours_us": 4.0},
    ]
    script = ROOT / "docs" / "images" / "roofline.py"
    spec = importlib.util.spec_from_file_location("roofline", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.shares(rows, "ours", 1) == ([1, 4], [0.1, 0.5])
    assert module.shares(rows, "cutlass", 1) == ([4], [0.25])
    (tmp_path / "figures.json").write_text(json.dumps({"rows": rows}))
    command = [sys.executable, str(script), str(tmp_path / "figures.json"), str(tmp_path / "out.png"), "1", "16"]
    subprocess.run(command, check=True)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_ranges_of_batch_sizes_are_fewer_and_whole() -> None:
    """Every size has one range; those that are measured have their own."""
    ranges: list[list[Any]] = [[8 * i, 8 * i + 8, {"name": i}] for i in range(100)] + [[800, 1 << 30, {"name": 100}]]
    few = few_humming.thinned(ranges, (1, 8, 64, 500))
    assert [entry[2]["name"] for entry in few] == [0, 7, 62, 100]
    assert [entry[:2] for entry in few] == [[0, 8], [8, 64], [64, 504], [504, 1 << 30]]
    assert few_humming.thinned(ranges, [entry[1] for entry in ranges]) == ranges


def test_ranges_of_experts_end_at_the_sizes() -> None:
    """Two lists of ranges become alike, each with what it has for a size."""
    wide: list[list[Any]] = [[0, 16, "a"], [16, 64, "b"], [64, 1 << 30, "c"]]
    narrow: list[list[Any]] = [[0, 8, "d"], [8, 1 << 30, "e"]]
    assert few_humming.ending_at(wide, (8, 64)) == [[0, 8, "a"], [8, 64, "b"], [64, 1 << 30, "c"]]
    assert few_humming.ending_at(narrow, (8, 64)) == [[0, 8, "d"], [8, 64, "e"], [64, 1 << 30, "e"]]


@pytest.mark.slow
def test_engines_start_together_and_take_turns(tmp_path: Path) -> None:
    """One that fails while the others wait does not hold them up; a mixture is served too."""
    kinds = ["--kinds", "w4a16", "w4a16-humming", "lut", "--model", "tiny-moe", "--together", "--timeout", "100"]
    done, document = serve(tmp_path, *kinds)
    assert done.returncode == 1
    assert "no humming here" in done.stdout
    assert [(row["kind"], row["batch"]) for row in document["rows"]] == [
        ("w4a16", 1),
        ("w4a16", 4),
        ("lut", 1),
        ("lut", 4),
    ]
    assert document["settings"]["together"]


def _answers(noise: float, seed: int, *, shift: float = 0.0, other: int = 0) -> list[dict[str, Any]]:
    """Return 16 answers of 200 places; `other` of each prompt's likeliest tokens are others."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt": (torch.randn(200, generator=draw, dtype=torch.float64) * noise + shift - 3).tolist(),
            "best": [1] * other + [0] * (200 - other),
            "tokens": [7, 8],
        }
        for _ in range(16)
    ]


@pytest.mark.parametrize(
    ("answers", "within"),
    [
        (_answers(0.01, 1), True),
        (_answers(0.014, 2, other=2), True),
        (_answers(0.02, 3), False),
        (_answers(0.01, 4, shift=-0.003), False),
        (_answers(0.01, 5, other=5), False),
        (_answers(0.0, 6), True),
    ],
)
def test_gaps_are_judged_by_what_stock_differs_from_itself(answers: list[dict[str, Any]], within: bool) -> None:
    """By their size, by whether all log-probabilities shift, and by how many likeliest tokens are others."""
    exact = _answers(0.0, 0)
    own = [gaps.compare(_answers(0.01, 7, other=2), exact), gaps.compare(exact, exact)]
    assert gaps.is_within(gaps.compare(answers, exact), own) is within


def test_one_token_is_chance() -> None:
    """A large gap of a single token carries the mean, and says nothing of all others."""
    exact, answers = _answers(0.0, 0), _answers(0.01, 1)
    answers[3]["prompt"][5] += 30
    own = [gaps.compare(_answers(0.01, 7), exact)]
    row = gaps.compare(answers, exact)
    assert row["mean_gap"] > gaps.SLACK * own[0]["mean_gap"]
    assert gaps.is_within(row, own)
    for answer in answers:
        answer["prompt"][5] += 30
    assert not gaps.is_within(gaps.compare(answers, exact), own)


def test_a_shift_has_the_error_of_its_prompts() -> None:
    """Tokens of a prompt that shift together count once."""
    exact = [{"prompt": [0.0] * 9, "best": [0] * 9, "tokens": [1]} for _ in range(4)]
    moved = [answer | {"prompt": [step] * 9} for answer, step in zip(exact, (0.1, -0.1, 0.3, 0.1), strict=True)]
    row = gaps.compare(moved, exact)
    assert row["shift"] == pytest.approx(0.1)
    assert row["shift_error"] == pytest.approx(torch.tensor([0.1, -0.1, 0.3, 0.1]).std().item() / 2)
    assert (row["mean_gap"], row["max_gap"]) == (pytest.approx(0.15), 0.3)


def test_all_mixtures_that_have_launches_are_checked() -> None:
    """At their own sizes, by check_experts.py."""
    from check_experts import TUNED

    from convert_w4a8.kernels.gemm.tuned_experts import LAUNCHES

    assert {(size.experts, size.hidden, size.intermediate) for size in TUNED} == {key[:3] for key in LAUNCHES}
