"""How numba comes into a process: without what a working directory says, and once for all threads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("numba", reason="numba is not installed")

PLANTED = """\
cache_dir: ./evil
disable_jit: 1
debug_cache: 1
debug: nonsense
"""
"""The last is no number, so that numba warns whenever it reads it."""
SHOW = """
from numba import config
print(json.dumps({"cache": config.CACHE_DIR, "jit": not config.DISABLE_JIT, "debug": config.DEBUG_CACHE}))
"""
ALONE = f"import json\n{SHOW}"
OURS = f"""
import json
import torch
from convert_w4a8 import devices
from convert_w4a8.linear import Packing

kernels = devices.repack(torch.device("cpu"))
assert kernels.__name__ == "convert_w4a8.kernels.repack.cpu"
words = torch.arange(64, dtype=torch.int32).view(4, 16)
reordered = kernels.reorder(words, Packing.GPTQ)
assert torch.equal(kernels.restore(reordered), words.t())
{SHOW}"""


def run(program: str, directory: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """Run a program in a directory; return the one line that it printed, JSON, and what it said on stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    command, env = [sys.executable, "-c", program], {**inherited, **environment}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found, done.stderr


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Return a directory as a checkpoint might be, with settings for numba in it."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / ".numba_config.yaml").write_text(PLANTED)
    return directory


def test_numba_itself_reads_settings_in_the_working_directory(planted: Path) -> None:
    """So it matters what we do about it, and what is planted here is what it understands, or warns of."""
    found, said = run(ALONE, planted)
    assert found == {"cache": "./evil", "jit": False, "debug": 1}
    assert "'NUMBA_DEBUG' is defined but its associated value 'nonsense' could not be parsed" in said


@pytest.mark.parametrize("before", ["", "import numba\n"], ids=["we import numba", "it is imported already"])
def test_our_kernels_run_without_the_settings_of_the_working_directory(before: str, planted: Path) -> None:
    """Neither when numba is imported nor when it compiles; variables hold, and nothing is written there."""
    kept = planted.parent / "kept"
    found, _ = run(before + OURS, planted, NUMBA_CACHE_DIR=str(kept))
    assert found == {"cache": str(kept), "jit": True, "debug": 0}
    assert list(kept.rglob("*.nbc")), "nothing was compiled"
    assert [path.name for path in planted.iterdir()] == [".numba_config.yaml"]


def test_the_settings_are_never_read(planted: Path) -> None:
    """Nothing is said of them, and compiled kernels lie beside their sources, as is numba's default."""
    assert run(OURS, planted) == ({"cache": "", "jit": True, "debug": 0}, "")
    assert [path.name for path in planted.iterdir()] == [".numba_config.yaml"]


ABSENT = """
import sys, time
class Nowhere:
    def find_spec(self, name, path, target=None):
        if name == "numba":
            time.sleep(0.1)  # long enough for other threads to ask as well
            raise ModuleNotFoundError("No module named 'numba'")
sys.meta_path.insert(0, Nowhere())
"""
THREADS = """
import json, logging, threading
import torch
from convert_w4a8 import devices
lines, found, barrier = [], [], threading.Barrier(8)
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("convert_w4a8").addHandler(handler)
def ask():
    barrier.wait()
    found.append(devices.repack(torch.device("cpu")).__name__)
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"found": found, "lines": lines}))
"""


@pytest.mark.parametrize("works", [True, False], ids=["numba works", "numba is absent"])
def test_threads_that_ask_at_once_get_the_same_kernels(works: bool, tmp_path: Path) -> None:
    """A conversion's first layers are worked on side by side; if numba is missing, one of them says so."""
    found, _ = run(THREADS if works else ABSENT + THREADS, tmp_path)
    assert found["found"] == [f"convert_w4a8.kernels.repack.{'cpu' if works else 'reference'}"] * 8
    assert len(found["lines"]) == (0 if works else 1)
