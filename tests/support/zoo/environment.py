"""Where the zoo's packages lie, and how to start a process that has them. Needs neither vLLM nor torch.

vLLM itself is its Python sources alone, as scripts/fetch_vllm_wheels.py fetches them: no compiled code is needed to
build and fill a model. What it imports besides is in requirements*.txt, installed beside this project's own environment
by scripts/setup_zoo.py, and comes first on the path of the zoo's processes only.
"""

import os
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
VERSIONS = ("0.25.1", "0.33.0")
"""The oldest and the newest vLLM that the plugin supports."""

_CACHE = Path.home() / ".cache" / "w4a8-convert"
SOURCES = Path(os.environ.get("W4A8_VLLM_SOURCES", _CACHE / "vllm"))
ZOO = Path(os.environ.get("W4A8_ZOO", _CACHE / "zoo"))


def requirements(version: str) -> tuple[Path, Path]:
    """Return the lists of packages for a version of vLLM: its own, and what is the same for all."""
    return HERE / f"requirements-{version}.txt", HERE / "requirements.txt"


def packages(requirement: Path) -> Path:
    """Return where the packages of a list lie: a directory for each state of it and version of Python."""
    state = zlib.crc32(requirement.read_bytes())
    return ZOO / f"{requirement.stem}-py{sys.version_info[0]}{sys.version_info[1]}-{state:08x}"


def missing(version: str) -> str | None:
    """Return what the zoo of a version of vLLM lacks on this machine, and how to get it; None if nothing."""
    if not (SOURCES / version / "vllm").is_dir():
        return f"vLLM {version} is not in {SOURCES}: run scripts/setup_zoo.py"
    if not all(packages(requirement).is_dir() for requirement in requirements(version)):
        return f"the zoo's packages are not in {ZOO}: run scripts/setup_zoo.py"
    return None


def variables(version: str) -> dict[str, str]:
    """Return the environment variables of a process that imports this version of vLLM."""
    path = (*map(packages, requirements(version)), SOURCES / version, ROOT, HERE.parent)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
