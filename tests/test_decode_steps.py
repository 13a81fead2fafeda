"""Traces of decode steps: whose time each moment is, and where steps begin and end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

sys.path.append(str(ROOT / "scripts" / "gpu"))
import decode_steps
from decode_steps import GAP, Event


def trace(steps: int) -> list[Event]:
    """Return steps of 10 µs: four GEMMs, each begins early, nothing, an argmax; a prefill before."""
    events = [Event("prefill", 0, 50_000)]
    for step in range(steps):
        begin = 50_000 + 10_000 * step
        events += [Event("_gemm_kernel", begin + 1500 * i - 500 * (i > 0), begin + 1500 * (i + 1)) for i in range(4)]
        events.append(Event("at::reduce_kernel<ArgMaxOps>", begin + 7000, begin + 10_000))
    return events


def test_times_of_a_step_add_up_to_it() -> None:
    """Kernels that overlap, and gaps: the prefill is in none of the last steps."""
    steps = decode_steps.last_steps(trace(20), 8, 20)
    found = decode_steps.times(steps, 8)
    assert set(found) == {"_gemm_kernel", "at::reduce_kernel<ArgMaxOps>", GAP}
    assert found["_gemm_kernel"] == (6.0, 4.0)
    assert found["at::reduce_kernel<ArgMaxOps>"] == pytest.approx((3.0, 1.0), rel=0.2)
    assert found[GAP] == (1.0, 1.0)
    assert decode_steps.by_class(found)["gemms"] == 6.0
    assert sum(decode_steps.by_class(found).values()) == pytest.approx(10.0, rel=1e-3)


def test_a_kernel_within_another_takes_no_time() -> None:
    """What starts and ends while another runs, and one that starts when it has ended."""
    found = decode_steps.times([Event("a", 0, 4000), Event("b", 1000, 2000), Event("c", 4000, 5000)], 1)
    assert found == {"a": (3.0, 1.0), "b": (1.0, 1.0), "c": (1.0, 1.0), GAP: (0.0, 0.0)}


def test_no_steps_to_be_seen() -> None:
    """Nothing ran once a step."""
    with pytest.raises(ValueError, match="no kernel ran once"):
        decode_steps.last_steps(trace(20), 8, 40)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<>>>", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<>", "cache"),
        ("_gemm_kernel", "gemms"),
        ("_grouped_kernel", "experts"),
        ("void vllm::moe::moe_align_block_size_kernel<int>", "experts"),
        ("void cutlass::device_kernel<machete::MacheteKernel>", "gemms"),
        ("nvjet_tst_64x8_64x16_2x1_v_bz_TNT", "lm_head"),
        ("_quantize_kernel", "activations"),
        ("void at::native::reduce_kernel<ArgMaxOps>", "sampling"),
        ("Memcpy DtoH (Device -> Pinned)", decode_steps.REST),
    ],
)
def test_classes_of_kernels(name: str, group: str) -> None:
    """As the kernels are called on an H100."""
    assert decode_steps.class_of(name) == group


ENGINE = '''
from types import SimpleNamespace

import torch.profiler

calls = []


class Trace:
    """Says that a step has a GEMM of 2 µs and an argmax of 1 µs, a microsecond after it."""

    def __init__(self, activities):
        def event(name, begin, us):
            about = {"name": name, "start_ns": begin, "duration_ns": 1000 * us, "device_type": "DeviceType.CUDA"}
            return SimpleNamespace(**{key: lambda value=value: value for key, value in about.items()})

        each = (("_gemm_kernel", 0, 2), ("argmax", 3000, 1))
        found = [event(name, 9000 * step + begin, us) for step in range(64) for name, begin, us in each]
        self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: found))

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        pass


torch.profiler.profile = Trace


class SamplingParams:
    def __init__(self, **settings):
        pass


class LLM:
    def __init__(self, model, **settings):
        if model.endswith("stock"):
            raise RuntimeError("no engine here")
        self.worker = SimpleNamespace()

    def generate(self, prompts, params, use_tqdm):
        times = {"scheduled_ts": 0.0, "first_token_latency": 1.0, "first_token_ts": 1.0, "last_token_ts": 2.0}
        return [SimpleNamespace(metrics=SimpleNamespace(**times)) for _ in prompts]

    def collective_rpc(self, function):
        return [function(self.worker)]
'''


@pytest.mark.slow
def test_engines_are_traced(tmp_path: Path) -> None:
    """With a stand-in for vLLM: a row for each engine and batch; one that does not start is left out."""
    site = tmp_path / "site" / "vllm"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text(ENGINE)
    command = [sys.executable, str(ROOT / "scripts" / "gpu" / "bench_serving.py"), "--model", "tiny", "--together"]
    command += ["--kinds", "lut", "stock", "--seconds", "0", "--cases", "2x8", "--dir", str(tmp_path)]
    command += ["--trace", "1", "4", "--trace-json", str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no engine here" in done.stdout
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert [(row["kind"], row["batch"]) for row in rows] == [("lut", 1), ("lut", 4)]
    assert [rows[0][f"{name}_us"] for name in ("gemms", "sampling", "gap")] == pytest.approx([2, 1, 6], rel=1e-3)
