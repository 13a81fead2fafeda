"""The Dockerfile, as far as it can be judged by reading: there is no container engine where the tests run."""

import re
import shlex
import tomllib
from fnmatch import fnmatch

from paths import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
NEEDED = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "convert_w4a8", "kernels", "constraints.txt"}
"""What the package is built from (tests/test_packaging.py builds it), and its pinned versions."""


def instructions() -> list[tuple[str, str]]:
    """Return the instructions in their order, with their arguments in one line each."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, _, arguments in pairs]


def arguments_of(name: str) -> list[str]:
    """Return the arguments of every instruction of a kind."""
    return [arguments for instruction, arguments in instructions() if instruction == name]


def test_base_and_entry() -> None:
    """A pinned slim Python that the package allows; the container is the command, and tells how to use it."""
    assert arguments_of("FROM") == ["python:3.12-slim"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments_of("ENTRYPOINT") == ['["w4a8-convert"]']
    assert {"w4a8-convert", "w4a8"} <= project["scripts"].keys()
    assert arguments_of("CMD") == ['["--help"]']
    assert instructions()[-3][0] == "WORKDIR"


def test_pytorch_for_cpus_comes_first_and_nothing_is_cached() -> None:
    """Every pip leaves no cache, knows the pinned versions and the index of PyTorch for CPUs; the package is last."""
    steps = [step.strip() for run in arguments_of("RUN") for step in run.split("&&")]
    pips = [shlex.split(step) for step in steps if step.startswith("pip ")]
    assert [words[-1] for words in pips] == ["torch", "/src"]
    for words in pips:
        assert words[:3] == ["pip", "install", "--no-cache-dir"]
        assert words[words.index("--constraint") + 1] == "/src/constraints.txt"
        assert words[words.index("--extra-index-url") + 1] == "https://download.pytorch.org/whl/cpu"
    assert not [step for step in steps if "apt" in step]
    assert "rm -rf /src" in steps


def test_the_user_is_not_root_and_can_write_what_is_kept() -> None:
    """From the last instruction that needs root on; caches lie where any user may write."""
    names = [name for name, _ in instructions()]
    (user,) = arguments_of("USER")
    assert user not in ("root", "0")
    assert f" {user} " in arguments_of("RUN")[-1]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    assert "--mode=1777 /cache /data" in arguments_of("RUN")[-1]
    variables = dict(pair.split("=") for pair in arguments_of("ENV")[0].split())
    assert variables == {"HF_HOME": "/cache/huggingface", "NUMBA_CACHE_DIR": "/cache/numba"}


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    """The build sees what it needs, and nothing else of the checkout: no .git, no demo, no checkpoints."""
    copied = {source for arguments in arguments_of("COPY") for source in arguments.split()[:-1]}
    assert copied == NEEDED
    assert all((ROOT / name).exists() for name in copied)
    everything, *rules = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    assert everything == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert allowed == NEEDED
    assert fnmatch("convert_w4a8/cli/__pycache__", next(rule for rule in rules if not rule.startswith("!")))
