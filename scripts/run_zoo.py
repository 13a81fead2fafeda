"""Load whole converted models with vLLM's own classes, on a CPU, and compare every weight with the source.

    python scripts/setup_zoo.py                     # once
    python scripts/run_zoo.py run                       # tiny models of all architectures
    python scripts/run_zoo.py run llama mixtral         # of some
    python scripts/run_zoo.py check DIR ...             # your own checkpoint, AWQ, GPTQ or compressed-tensors

Each in both output formats, `lut` with `search` and with `direct` scales, whole and as one of two tensor-parallel
ranks, with vLLM 0.25.1 and 0.33.0 (--version names one). tests/support/zoo says how. Exits with 1 if anything is
loaded wrong, or not loaded at all.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "scripts" / "bench")]
import results  # noqa: E402
from zoo import environment, table  # noqa: E402
from zoo.rows import BAD  # noqa: E402


def run(version: str, action: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Run the zoo of one version of vLLM in a process of its own; return its rows."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "rows.json"
        command = [sys.executable, "-m", "zoo", action, *names, "--json", str(out)]
        process = subprocess.run(command, env=environment.variables(version), check=False)
        if not out.is_file():
            raise SystemExit(f"the zoo of vLLM {version} ended with exit code {process.returncode}")
        rows: list[Mapping[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return [{"vllm": version, **row} for row in rows]


def main() -> int:
    """Run it, and keep the figures if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "check"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types, or directories")
    parser.add_argument("--version", action="append", choices=environment.VERSIONS, help="of vLLM; default: both")
    results.add_options(parser)
    args = parser.parse_intermixed_args()
    if args.action == "check" and not args.names:
        parser.error("check needs a directory")
    versions = args.version or environment.VERSIONS
    for version in versions:
        if reason := environment.missing(version):
            sys.exit(reason)
    with ThreadPoolExecutor() as pool:
        found = pool.map(run, versions, repeat(args.action), repeat(args.names))
        rows = [row for some in found for row in some]
    bad = [row for row in rows if row["status"] in BAD]
    for row in bad:
        where = f"{row['format']} {row['scales']}, TP {row['tp']}, vLLM {row['vllm']}"
        print(f"{row['status']}: {row['architecture']}, {where}")
    if args.json or args.keep:
        question = "Which architectures does vLLM load from our outputs, weight by weight?"
        results.save(args, question, table.summarize(rows), versions={"vllm": " and ".join(versions)})
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
