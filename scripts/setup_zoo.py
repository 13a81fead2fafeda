"""Get what the zoo needs (tests/support/zoo): vLLM's Python sources, and what vLLM imports besides.

The sources are those of scripts/fetch_vllm_wheels.py. The packages of tests/support/zoo/requirements*.txt (75 MB to
download, 290 MB on disk) go into directories of their own, each whole or not at all, below ~/.cache/w4a8-convert/zoo or
$W4A8_ZOO. Torch and the like are those of the environment that runs this, which must be the project's own. What is
there is not fetched again. Exits with 1 and pip's words where something cannot be had.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))
from zoo import environment  # noqa: E402


def install(requirement: Path) -> None:
    """Install the packages of a list, unless they are there."""
    target = environment.packages(requirement)
    if target.is_dir():
        print(f"{requirement.name}: already in {target}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packages-", dir=target.parent) as name:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir", "--no-compile"]
        where = ["--only-binary", ":all:", "--target", f"{name}/packages", "--requirement", str(requirement)]
        if subprocess.run([*pip, *where], check=False).returncode:
            sys.exit(f"the packages of {requirement} cannot be installed")
        (Path(name) / "packages").rename(target)
    print(f"{requirement.name}: in {target}")


def main() -> None:
    """Get what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    fetch = [sys.executable, str(ROOT / "scripts" / "fetch_vllm_wheels.py"), *environment.VERSIONS]
    if subprocess.run(fetch, check=False).returncode:
        sys.exit(1)
    for version in environment.VERSIONS:
        for requirement in environment.requirements(version):
            install(requirement)


if __name__ == "__main__":
    main()
