# ruff: noqa: PTH104, PTH211  (names that are not ASCII)
"""Environments in which nothing is as usual, for interpreters of their own."""

import os
import random
import resource
from pathlib import Path

from class_streams import commands
from judge import Case, drop_capabilities

_PLANTED = {
    ".numba_config.yaml": "cache_dir: .cache\ndisable_jit: 1\n",
    "matplotlibrc": "text.usetex: True\nbackend: nosuch\n",
    "numpy.py": "open('/%s/owned', 'w')\nraise SystemExit(99)\n",
    "torch.py": "open('/%s/owned', 'w')\nraise SystemExit(99)\n",
    "yaml.py": "open('/%s/owned', 'w')\nraise SystemExit(99)\n",
    "sitecustomize.py": "open('/%s/owned', 'w')\n",
    "usercustomize.py": "open('/%s/owned', 'w')\n",
    "convert_w4a8.py": "open('/%s/owned', 'w')\n",
    "pyvenv.cfg": "home = /nowhere\n",
    ".env": "HF_TOKEN=x\nLD_PRELOAD=/nowhere\n",
    "pyproject.toml": "[tool.w4a8]\nx = 1\n",
    "setup.cfg": "[x]\n",
    ".netrc": "machine huggingface.co login x password x\n",
    "triton.py": "open('/%s/owned', 'w')\n",
    ".triton": "x",
}


def environment(place: Path, base: Path, rng: random.Random, needs: list[str]) -> Case:
    """Make a case: a locale, directory, limit or variable with which an interpreter starts."""
    command, may = commands(place, base, rng, needs)
    codes: tuple[int, ...] = (0, 1, 2)
    variables: dict[str, str | None] = {}
    limits: list[tuple[int, int]] = []
    cwd: Path | None = None
    reads: tuple[Path, ...] = (base,)
    locked = place.parent / "locked"
    locked.mkdir()
    locked.chmod(0)
    quiet = False
    match rng.randrange(7):
        case 0:
            label = "HOME"
            variables["HOME"] = rng.choice(
                (None, "", str(locked), "/nonexistent", "/dev/null", "relative", "~", "/proc/1")
            )
        case 1:
            name = rng.choice(
                (
                    "TMPDIR",
                    "XDG_CACHE_HOME",
                    "NUMBA_CACHE_DIR",
                    "MPLCONFIGDIR",
                    "HF_HOME",
                    "TRITON_CACHE_DIR",
                    "TORCHINDUCTOR_CACHE_DIR",
                )
            )
            label = name
            variables[name] = rng.choice((str(locked), "/nonexistent/x", "/dev/null", "", "~nosuchuser", "/dev/full/x"))
            may += (place.parent / "cwd" / "~nosuchuser",)  # as who sets the variable asks for
        case 2:
            label = "locale"
            variables |= {
                "LC_ALL": rng.choice(("C", "POSIX", "xx_YY.UTF-8", "en_US.ISO-8859-1", "")),
                "PYTHONUTF8": rng.choice(("0", None)),
                "PYTHONIOENCODING": rng.choice(("ascii", "latin-1", "utf-16", None)),
                "PYTHONCOERCECLOCALE": "0",
            }
            os.rename(place / "in", place / "in é中")
            os.symlink("in é中", place / "in")
            reads = (base, place / "in é中")
            quiet = variables["PYTHONIOENCODING"] == "utf-16"
        case 3:
            label = "working directory"
            cwd = place.parent / "hostile"
            cwd.mkdir()
            for name, content in _PLANTED.items():
                (cwd / name).write_text(content.replace("/%s", str(cwd)))
            codes = (0, 1, 2)
        case 4:
            label = "limits"
            kind, values = rng.choice(
                (
                    (resource.RLIMIT_AS, (1 << 30, 2 << 30, 3 << 30, 4 << 30, 6 << 30)),
                    (resource.RLIMIT_NOFILE, (20, 40, 64)),
                    (resource.RLIMIT_FSIZE, (0, 1000, 100_000, 500_000)),
                    (resource.RLIMIT_STACK, (1 << 18, 1 << 20)),
                    (resource.RLIMIT_NPROC, (1, 50)),
                )
            )
            limits.append((kind, rng.choice(values)))
            label = f"limit {kind} of {limits[0][1]}"
        case 5:
            label = "settings of others"
            variables |= rng.choice(
                (
                    {"NUMBA_DISABLE_JIT": "1"},
                    {"NUMBA_NUM_THREADS": "nonsense"},
                    {"NUMBA_NUM_THREADS": "0"},
                    {"OMP_NUM_THREADS": "nonsense"},
                    {"OMP_NUM_THREADS": "-1"},
                    {"MPLBACKEND": "nosuch"},
                    {"CUDA_VISIBLE_DEVICES": "nonsense"},
                    {"TRITON_INTERPRET": "1"},
                    {"PYTHONWARNINGS": "error"},
                    {"PYTHONINTMAXSTRDIGITS": "0"},
                    {"PYTHONINTMAXSTRDIGITS": "640"},
                    {"HF_ENDPOINT": "nonsense"},
                    {"HF_TOKEN": "x\ny"},
                    {"COLUMNS": "0"},
                    {"COLUMNS": "9" * 5000},
                    {"TERM": ""},
                    {"NO_COLOR": "1", "FORCE_COLOR": "1"},
                    {"TZ": "nonsense"},
                )
            )
        case _:
            label = "nothing"
            keep = ("PATH", "LD_LIBRARY_PATH")
            variables |= {name: None for name in os.environ if name not in keep}
            variables["TMPDIR"] = None
    label += "".join(f" {name}={str(value)[:20]}" for name, value in variables.items())[:120]

    def prepare() -> None:
        drop_capabilities()
        for kind, value in limits:
            resource.setrlimit(kind, (value, value))

    small = bool(limits)
    return Case(
        f"{label}: {' '.join(command[:1])}",
        command,
        may,
        reads,
        prepare,
        variables,
        cwd,
        True,
        codes,
        quiet=quiet,
        left=small,
    )
