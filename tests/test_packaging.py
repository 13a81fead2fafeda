"""What is published: its files, its metadata, and that it works where nothing of the checkout is to be seen.

Archives are made by setuptools' own hooks, as `python -m build` and pip call them, from a copy of the tree.
"""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from convert_w4a8 import __version__

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
REPORT, QUANTIZE, RAY = (
    [Requirement(line) for line in PROJECT["project"]["optional-dependencies"][extra]]
    for extra in ("report", "quantize", "ray")
)
IMPORTED_AS = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
FOLDERS = ("convert_w4a8", "kernels", "docs", "scripts", "tests")


def modules(root: Path) -> set[str]:
    """Return the files that a tree promises to the wheel, by their names there."""
    ours = {path.relative_to(root) for path in (root / "convert_w4a8").rglob("*.py")}
    kernels = {Path("convert_w4a8") / path.relative_to(root) for path in (root / "kernels").rglob("*.py")}
    return {path.as_posix() for path in ours | kernels} | {"convert_w4a8/py.typed"}


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level names that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def pins(name: str) -> dict[str, Version]:
    """Return the versions of a constraints file, which are all exact."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = [re.fullmatch(r"([\w-]+)==(\S+)", line) for line in lines if line]
    assert all(found)
    return {canonicalize_name(match[1]): Version(match[2]) for match in found if match}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    """Even what is imported inside functions; not vLLM, inside which the plugin runs and never without."""
    names = {name for file in modules(ROOT) - {"convert_w4a8/py.typed"} for name in imported(ROOT / file)}
    declared = {canonicalize_name(requirement.name) for requirement in [*DEPENDENCIES, *REPORT, *QUANTIZE, *RAY]}
    assert names - sys.stdlib_module_names - {"convert_w4a8", "vllm"} == {
        IMPORTED_AS.get(name, name) for name in declared
    }


def test_the_oldest_versions_are_the_ones_declared() -> None:
    """constraints-oldest.txt pins what pyproject.toml states as the minimum; torch is pinned for another reason."""
    oldest = pins("constraints-oldest.txt")
    for requirement in [*DEPENDENCIES, *REPORT]:
        (specifier,) = requirement.specifier
        assert specifier.operator == ">="
        if requirement.name != "torch":
            assert oldest[canonicalize_name(requirement.name)] == Version(specifier.version), requirement.name


def test_the_pinned_versions_are_allowed_and_complete() -> None:
    """constraints.txt names every direct requirement, groups included, and a version that it allows."""
    pinned = pins("constraints.txt")
    groups = [line for group in PROJECT["dependency-groups"].values() for line in group if isinstance(line, str)]
    for requirement in [*DEPENDENCIES, *REPORT, *QUANTIZE, *map(Requirement, groups)]:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement.name


def test_the_version_is_read_without_importing_torch() -> None:
    """The package knows its version in a checkout that is not installed, and at once."""
    code = "import convert_w4a8, sys; assert 'torch' not in sys.modules; print(convert_w4a8.__version__)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == __version__


def copy_of_the_tree(target: Path) -> Path:
    """Copy what archives are made from, and what must not get into them; links as links."""
    target.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, symlinks=True)
    return target


def build(tree: Path, kind: str) -> Path:
    """Make a "wheel" or an "sdist" of a tree; skips where setuptools is missing or too old."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return archive


def in_wheel(wheel: Path) -> set[str]:
    """Return the names of a wheel's files, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make the sdist of this tree, and the wheel from the unpacked sdist, as `python -m build` does."""
    directory = tmp_path_factory.mktemp("archives")
    sdist = build(copy_of_the_tree(directory / "tree"), "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    return sdist, build(directory / sdist.name.removesuffix(".tar.gz"), "wheel")


@pytest.mark.slow
def test_archives_hold_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    """The kernels are inside the package, as files; tests and scripts are in neither archive."""
    sdist, wheel = archives
    assert in_wheel(wheel) == modules(ROOT)
    with tarfile.open(sdist) as archive:
        assert not any(member.issym() or member.islnk() for member in archive)
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in names if name.startswith("convert_w4a8/")} == modules(ROOT)
    assert {name for name in names if "/" not in name} == {
        "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg",
    }  # fmt: skip
    assert {name.partition("/")[0] for name in names if "/" in name} == {"convert_w4a8", "w4a8_convert.egg-info"}


@pytest.mark.slow
def test_new_folders_are_found(tmp_path: Path) -> None:
    """A folder that is added later needs no line in pyproject.toml, whether it has an `__init__.py` or not."""
    tree = copy_of_the_tree(tmp_path / "tree")
    planted = ("convert_w4a8/new/__init__.py", "convert_w4a8/new/inner/part.py", "kernels/new/inner/gpu.py")
    for name in planted:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    found = in_wheel(build(tree, "wheel"))
    assert found == modules(tree)
    assert found - modules(ROOT) == {planted[0], planted[1], f"convert_w4a8/{planted[2]}"}


_INSPECT = """
import importlib, importlib.metadata, importlib.util, pathlib, sys
import convert_w4a8
home = pathlib.Path(sys.prefix).resolve()
assert home in pathlib.Path(convert_w4a8.__file__).resolve().parents, convert_w4a8.__file__
distribution = importlib.metadata.distribution("w4a8-convert")
assert distribution.version == convert_w4a8.__version__
for point in distribution.entry_points:
    assert callable(point.load()), point
for file in distribution.files:
    if file.parts[:2] == ("convert_w4a8", "kernels") and file.suffix == ".py":
        importlib.import_module(".".join(file.with_suffix("").parts))
assert importlib.util.find_spec("kernels") is None
"""


@pytest.mark.slow
def test_the_installed_wheel_converts(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """In a new environment, which sees the dependencies of this one and no checkout."""
    pytest.importorskip("pip", reason="installing the wheel needs pip")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    # A path in a .pth file: the .pth files found there, those of editable installs, are not read.
    (site,) = venv.glob("lib/python*/site-packages")
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(here), encoding="utf-8")

    def run(*command: str | Path) -> str:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", archives[1])
    run(venv / "bin" / "python", "-c", _INSPECT)
    assert __version__ in run(venv / "bin" / "w4a8", "--version")

    pytest.importorskip("safetensors", reason="the script that makes a checkpoint needs safetensors")
    (script,) = (ROOT / "scripts").rglob("make_demo_checkpoint.py")
    run(sys.executable, script, "in")
    run(venv / "bin" / "w4a8-convert", "in", "out")
    run(venv / "bin" / "w4a8", "verify", "out", "--source", "in")
