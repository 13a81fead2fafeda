"""Fetch the Python sources of the vLLM releases that the plugin supports: `fetch_vllm_wheels.py [VERSION ...]`.

tests/test_vllm_contract.py and tests/test_vllm_plugin.py read them; nothing of vLLM is installed or imported from here.
Each wheel (250 to 340 MB) is downloaded with pip, or taken from `--wheels DIR`, and only its `vllm/**/*.py` is kept:
~/.cache/w4a8-convert/vllm/VERSION, or $W4A8_VLLM_SOURCES/VERSION.
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
    """Download one wheel, whatever the machine's own platform is."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(directory), *PLATFORM]
    subprocess.run([*command, f"vllm=={version}"], check=True)


def unpack(wheel: Path, target: Path) -> int:
    """Write the wheel's Python sources below `target`; return how many there are."""
    with zipfile.ZipFile(wheel) as archive:
        sources = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        archive.extractall(target, sources)
    return len(sources)


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
            continue
        with tempfile.TemporaryDirectory() as directory:
            if args.wheels is None:
                download(version, Path(directory))
            wheel = next((args.wheels or Path(directory)).glob(f"vllm-{version}-*.whl"))
            print(f"vLLM {version}: {unpack(wheel, target)} files in {target}")


if __name__ == "__main__":
    main()
