"""Fetch the Python sources of the vLLM releases that the plugin supports: `fetch_vllm_wheels.py [VERSION ...]`.

The plugin's tests read them; nothing of vLLM is installed or imported from here. Each wheel (250 to 340 MB) is
downloaded with pip, or taken from `--wheels DIR`, and only its `vllm/**/*.py` is kept, whole or not at all:
~/.cache/w4a8-convert/vllm/VERSION, or $W4A8_VLLM_SOURCES/VERSION. What is there is not fetched again. It runs with any
Python that has pip; this package need not be installed. Exits with 1 and pip's words where a wheel cannot be had.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.25.1", "0.33.0")
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.12", "--only-binary", ":all:")


def download(version: str, directory: Path) -> None:
    """Download one wheel, whatever the machine's own platform is; past pip's cache, which it would only fill."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "-d", str(directory)]
    if subprocess.run([*command, *PLATFORM, f"vllm=={version}"], check=False).returncode:
        sys.exit(f"vLLM {version}: the wheel cannot be downloaded")


def unpack(wheel: Path, target: Path) -> int:
    """Write the wheel's Python sources below `target`; return how many there are."""
    with zipfile.ZipFile(wheel) as archive:
        sources = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        archive.extractall(target, sources)
    return len(sources)


def fetch(version: str, target: Path, wheels: Path | None) -> None:
    """Put the sources of one version into `target`, which appears when all of them are there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{version}-", dir=target.parent) as name:
        temporary = Path(name)
        if wheels is None:
            download(version, temporary)
        wheel = next((wheels or temporary).glob(f"vllm-{version}-*.whl"), None)
        if wheel is None:
            sys.exit(f"vLLM {version}: no wheel in {wheels}")
        count = unpack(wheel, temporary / "sources")
        (temporary / "sources").rename(target)
    print(f"vLLM {version}: {count} files in {target}")


def main() -> None:
    """Fetch what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--wheels", type=Path, help="a directory that holds the wheels already")
    args = parser.parse_args()
    cache = Path(os.environ.get("W4A8_VLLM_SOURCES", Path.home() / ".cache" / "w4a8-convert" / "vllm"))
    for version in args.versions:
        target = cache / version
        if (target / "vllm").is_dir():
            print(f"vLLM {version}: already in {target}")
        else:
            fetch(version, target, args.wheels)


if __name__ == "__main__":
    main()
