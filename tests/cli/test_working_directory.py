"""The working directory has no say: it may be a checkpoint's, and is full of what libraries look for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_edits import snapshot, write_case

from convert_w4a8 import convert

pytestmark = pytest.mark.slow

W4A8 = "import sys; sys.path[:] = {path!r}; from convert_w4a8.cli.main import main; main(prog_name='w4a8')"
PLACEHOLDER = "__editable__.w4a8_convert-0.1.0.finder.__path_hook__"
"""What an editable installation puts on the path: relative, so that the working directory may have one."""
ABSENT = "optional_module_that_is_not_installed"
SETTINGS = {
    ".numba_config.yaml": "cache_dir: ./evil\ndebug: nonsense\n",
    "matplotlibrc": "backend: nosuch\ntext.usetex: True\nfont.size: enormous\nno colon\n",
    "sitecustomize.py": "open('RUN', 'a')\n",
    "usercustomize.py": "open('RUN', 'a')\n",
    "torch.py": "open('RUN', 'a')\n",
    "matplotlib.py": "open('RUN', 'a')\n",
    "_ops.py": "open('RUN', 'a')\n",
    ".env": "HF_ENDPOINT=http://localhost:9\n",
    "pyvenv.cfg": "home = /nowhere\n",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a small checkpoint and its conversion."""
    root = tmp_path_factory.mktemp("pair")
    source = write_case("gptq-v1", root / "in").path
    convert(source, root / "out", device="cpu")
    return source, root / "out"


def run(cwd: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a directory."""
    command = [sys.executable, "-P", "-c", program, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=100)


def w4a8() -> str:
    """Return the program: with the path of this process, and what `python -c` and editable installations add."""
    path = [entry for entry in sys.path if os.path.isabs(entry)]  # noqa: PTH117
    return W4A8.format(path=[*path, "", PLACEHOLDER])


@pytest.mark.parametrize("kind", ["settings", "pipes", "directories"])
def test_a_report_is_made_as_anywhere(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Settings that are wrong, pipes that nobody writes to, directories: nothing is said, and nothing changes."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for name, content in SETTINGS.items():
        match kind:
            case "settings":
                (cwd / name).write_text(content)
            case "pipes":
                os.mkfifo(cwd / name)
            case _:
                (cwd / name).mkdir()
    before = snapshot(cwd)
    result = run(cwd, w4a8(), "report", pair[1], "--source", pair[0], "--html", "../report.html")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert snapshot(cwd) == before


def test_no_module_comes_from_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Libraries try to import what may not be installed."""
    (tmp_path / PLACEHOLDER).mkdir()
    for place in (tmp_path, tmp_path / PLACEHOLDER):
        (place / f"{ABSENT}.py").write_text("print('RUN')\n")
    asks = w4a8().replace(
        "main(prog_name", f"from convert_w4a8.report import inspection as i; old = i.as_text\n"
        f"def new(found):\n    import {ABSENT}\ni.as_text = new\nmain(prog_name"
    )  # fmt: skip
    result = run(tmp_path, asks, "inspect", pair[0])
    assert "RUN" not in result.stdout
    assert f"No module named '{ABSENT}'" in result.stderr
