"""`w4a8 env` and `--verbose`: what there is and what is missing, on any machine; what --workers does."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch
from checkpoint_edits import snapshot, write_case
from click.testing import CliRunner, Result
from paths import ROOT

import convert_w4a8
from convert_w4a8 import devices
from convert_w4a8.cli import environment, start
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.conversion import jobs
from convert_w4a8.linear import Packing

KEYS = {"versions", "platform", "cpu", "memory", "gpus", "device", "workers", "kernels", "caches", "notes"}


def invoke(*arguments: object) -> Result:
    """Run `w4a8` with some arguments."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def found() -> Any:
    """Return the document of `w4a8 env --json`."""
    result = invoke("env", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint."""
    return write_case("gptq-v1", tmp_path_factory.mktemp("env") / "in").path


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let compilers be looked for anew, in the test and after it."""
    yield
    devices._numba_works.cache_clear()
    devices._triton_works.cache_clear()
    devices._triton_problem.cache_clear()
    devices._missing.clear()


def test_env_says_what_there_is() -> None:
    """Versions, cores, memory, kernels and caches of this machine, with every key that the reference describes."""
    document = found()
    assert document.keys() == KEYS
    assert document["versions"]["w4a8-convert"] == convert_w4a8.__version__
    assert document["versions"]["torch"] == torch.__version__  # with what it was built for, unlike its metadata
    assert document["versions"]["numba"] == numba.__version__
    assert document["cpu"]["usable_cores"] >= 1
    assert document["memory"]["total_bytes"] > document["memory"]["available_bytes"] > 1 << 20
    assert {"cpu"} <= {kernel["device"] for kernel in document["kernels"]}
    by = {kernel["operation"]: kernel["by"] for kernel in document["kernels"] if kernel["device"] == "cpu"}
    assert by == {
        "repack": "numba",
        "codes": "numba",
        "tables": "torch",
        "gemm": "torch",
        "codebooks": "numba",
        "activations": "torch",
        "training": "torch",
        "blocks": "torch",
    }
    assert all(kernel["why_not"] is None for kernel in document["kernels"])
    assert document["caches"].keys() == {"hub", "numba", "triton", "temporary"}
    assert document["workers"] == jobs.worker_count()
    assert document["notes"] == []


def test_env_is_described() -> None:
    """Every key of the document is in the reference."""
    text = (ROOT / "docs" / "reference" / "json.md").read_text(encoding="utf-8")
    section = text.partition("## `w4a8 env`")[2].partition("\n## ")[0]
    described = set(re.findall(r"`([A-Za-z]\w*)`", section))
    document = found()
    inner = {*document["cpu"], *document["memory"], *document["caches"], *document["kernels"][0]}
    assert KEYS | inner | {"index", "name", "capability", "memory_bytes"} <= described


def test_env_for_people() -> None:
    """The same in lines."""
    lines = invoke("env").stdout.splitlines()
    assert f"w4a8-convert    {convert_w4a8.__version__}" in lines
    assert any(line.startswith("kernels         on cpu: repack by numba") for line in lines)


@pytest.mark.usefixtures("forgetful")
def test_env_where_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels take over, and why: in the result, not as a warning."""
    devices._numba_works.cache_clear()
    monkeypatch.setattr(devices, "_import_numba", lambda: exec("raise ImportError('needs NumPy 1.0')"))
    document = found()
    kernels = {kernel["operation"]: kernel for kernel in document["kernels"] if kernel["device"] == "cpu"}
    assert kernels["repack"]["by"] == kernels["codes"]["by"] == "torch"
    assert kernels["repack"]["why_not"] == "needs NumPy 1.0"
    assert kernels["tables"]["why_not"] is None
    assert "not compiled, so many times slower: needs NumPy 1.0" in invoke("env").stdout


@pytest.mark.parametrize("broken", ["torch", "huggingface_hub", "convert_w4a8.devices"])
def test_env_where_something_is_broken(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot even be imported is a note, not a traceback: that is when somebody looks here."""
    monkeypatch.setitem(sys.modules, broken, None)
    document = found()
    assert any(broken in note for note in document["notes"])
    assert document["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert invoke("env").exit_code == 0


def test_env_without_proc_and_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system without /proc, and packages that are not installed."""
    monkeypatch.setattr(environment, "_MEMINFO", tmp_path / "absent")
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    document = found()
    assert document["memory"] == {"total_bytes": None, "available_bytes": None, "limit_bytes": None}
    assert document["versions"]["no-such-package"] is None
    assert "no-such-package not installed" in invoke("env").stdout


def test_the_limit_of_a_container_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A number is a limit, "max" is none."""
    monkeypatch.setattr(environment, "_CGROUP_LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("max\n")
    assert found()["memory"]["limit_bytes"] is None
    (tmp_path / "memory.max").write_text("1000000000\n")
    assert found()["memory"]["limit_bytes"] == 10**9
    assert "limited to 1 GB" in invoke("env").stdout


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their compute capability; a driver that fails is a note."""
    h100 = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: h100)
    assert found()["gpus"] == [{"index": 0, "name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 80 * 10**9}]
    assert "GPU 0           NVIDIA H100, capability 9.0, 80 GB" in invoke("env").stdout
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: exec("raise RuntimeError('driver')"))
    assert found()["notes"] == ["GPUs: not known (RuntimeError: driver)"]


# --verbose.


@pytest.mark.parametrize("flags", [["-v"], ["--verbose", "--json"]], ids=" ".join)
def test_verbose_says_with_what_it_works(flags: list[str], source: Path, tmp_path: Path) -> None:
    """On stderr, before anything else; stdout is what it was."""
    result = CliRunner().invoke(convert, [str(source), str(tmp_path / "out"), "--workers", "3", *flags])
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[0].startswith("versions ")
    assert f"torch {torch.__version__}" in lines[0]
    assert re.match(r"device +cpu, 3 workers, \d+ of \d+ cores", lines[1])
    assert lines[2].startswith("kernels         on cpu: repack by")
    assert "versions" not in result.stdout


def test_check_is_verbose_too(source: Path) -> None:
    """The same of the other command that converts."""
    assert invoke("check", source, "-v").stderr.startswith("versions ")
    assert invoke("check", source).stderr == ""


def test_verbose_does_not_go_with_quiet(source: Path, tmp_path: Path) -> None:
    """They contradict each other: a usage error."""
    assert invoke("convert", source, tmp_path / "out", "-v", "--quiet").exit_code == 2


# Kernels that are compiled.


@pytest.fixture
def plan(source: Path) -> Any:
    """Return a plan."""
    return convert_w4a8.make_plan(source)


def test_compiling_is_said_once(
    plan: Any, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal, or if it is to be verbose, where numba keeps nothing yet."""
    device = torch.device("cpu")
    compiled: list[bool] = [False]
    monkeypatch.setattr(devices, "_keeps_something", lambda _kept: compiled[0])
    monkeypatch.setattr(start, "at_terminal", lambda: True)
    start.say_compiling(plan, device, verbose=False)
    assert capsys.readouterr().err == "compiling  the kernels for this CPU, once: that takes some seconds\n"
    compiled[0] = True
    start.say_compiling(plan, device, verbose=False)
    assert capsys.readouterr().err == ""
    compiled[0] = False
    monkeypatch.setattr(start, "at_terminal", lambda: False)
    start.say_compiling(plan, device, verbose=False)
    assert capsys.readouterr().err == ""
    result = CliRunner().invoke(convert, [str(source), str(tmp_path / "out"), "-v"])
    assert "compiling  the kernels" in result.stderr


def test_what_numba_keeps_is_found() -> None:
    """Something is kept after a kernel ran; what numba does not tell counts as kept, so that nothing is said."""
    device = torch.device("cpu")
    devices.repack(device).reorder(torch.zeros(16, 16, dtype=torch.int32), Packing.PACK_QUANTIZED)
    assert not devices.must_compile(["repack"], device)
    assert not devices.must_compile(["tables"], device)
    assert devices._keeps_something(object())
    assert not devices._keeps_something(SimpleNamespace(_cache_file=SimpleNamespace(_load_index=dict)))


def test_an_empty_cache_is_found(tmp_path: Path) -> None:
    """In a process of its own, with a cache of its own."""
    program = (
        "import torch\nfrom convert_w4a8 import devices\nfrom convert_w4a8.linear import Packing\n"
        "cpu = torch.device('cpu')\nprint(devices.must_compile(['repack'], cpu))\n"
        "devices.repack(cpu).reorder(torch.zeros(16, 16, dtype=torch.int32), Packing.PACK_QUANTIZED)\n"
        "print(devices.must_compile(['repack'], cpu))\n"
    )
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


# --workers.


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_so_many_layers_are_converted_at_a_time(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are asked for, more than cores and more than by default too; afterwards it is as before."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    seen, running, lock = [0], [0], threading.Lock()
    enough = threading.Event()

    def run() -> None:
        with lock:
            running[0] += 1
            seen[0] = max(seen[0], running[0])
            if running[0] == workers:
                enough.set()
        enough.wait(0.2)
        with lock:
            running[0] -= 1

    with jobs.use_workers(workers):
        jobs.run_jobs(jobs.Job(run, 1, "a") for _ in range(40))
    assert seen[0] == workers
    assert jobs.worker_count() == 2


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_worker_is_a_bug_of_the_caller(count: int) -> None:
    """ValueError in Python, a usage error on the command line."""
    with pytest.raises(ValueError, match="below 1"), jobs.use_workers(count):
        pass
    assert invoke("convert", "in", "out", "--workers", count).exit_code == 2


def test_workers_reach_the_conversion(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From both commands and both functions; the output is the same."""
    counts: list[int] = []
    real = jobs.worker_count

    def counted() -> int:
        counts.append(real())
        return counts[-1]

    monkeypatch.setattr(jobs, "worker_count", counted)
    assert invoke("convert", source, tmp_path / "one", "--workers", 1, "--quiet").exit_code == 0
    assert invoke("check", source, "--workers", 5).exit_code == 0
    convert_w4a8.convert(source, tmp_path / "seven", workers=7)
    convert_w4a8.check(source, workers=6)
    assert counts == [1, 5, 7, 6]
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "seven")


def test_the_logger_is_left_alone() -> None:
    """`env` silences it only while it looks."""
    logger = logging.getLogger("convert_w4a8")
    level = logger.level
    found()
    assert logger.level == level
