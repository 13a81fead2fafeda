"""What every benchmark writes: the question, the command, machine, versions and commit, and one row for each figure.

    add_options(parser)                     # --json FILE and --keep NAME
    save(args, question, rows)              # writes what these ask for, prints where

`--json FILE` writes one file anywhere. `--keep NAME` replaces the figures of a table of the documents, in
docs/benchmarks/results/NAME.json. Then run scripts/bench/tables.py. Without either nothing is written.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "numba", "triton", "safetensors")
VLLM_PACKAGES = (*PACKAGES, "transformers", "vllm")
MEASURED = ("convert_w4a8", "kernels", "scripts", "pyproject.toml")
"""What a figure depends on. The commit has "+changes" if any of it differs; documents and results may."""
NOT_REPEATED = ("--json", "--keep", "--directory", "--dir")
"""Options that only say where files lie: left out of the command that is written."""


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES calls them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else list(map(str, range(torch.cuda.device_count())))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --json and --keep to a script's options."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--keep", metavar="NAME", help="write them to docs/benchmarks/results/NAME.json, for a table")


def save(
    args: argparse.Namespace,
    question: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    extend: bool = False,
    merged: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Write what --json and --keep ask for, each as `write_results` does. Return the document, written or not."""
    if args.keep and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", args.keep):
        sys.exit(f"--keep {args.keep}: a name of small letters, digits and hyphens is needed")
    for path in filter(None, [args.json, args.keep and RESULTS / f"{args.keep}.json"]):
        write_results(path, question, rows, extend=extend, merged=merged, **more)
        print(f"written: {path}", file=sys.stderr)
    return describe(question, rows, **more)


def write_results(
    path: Path,
    question: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    extend: bool = False,
    merged: bool = False,
    **more: Any,
) -> None:
    """Write one file of figures: a JSON object with the keys that `describe` returns.

    A table of the documents (a file in RESULTS) keeps the question that it has, and the commands that come before
    ("setup"). Its note goes, if it has one: that was of the figures before.
    extend: add the rows to those of the file, for a question that takes several commands. All must be of one commit,
        machine and set of versions; otherwise SystemExit.
    merged: the rows hold those of the file already, which may be of other commits: each says its own.
    more: arguments of `describe`.
    """
    document = describe(question, rows, **more)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before is not None and path.parent == RESULTS:
        document = {key: before[key] for key in ("question", "setup") if key in before} | document
        document["question"] = before["question"]
    if before is not None and merged:
        for key in ("machine", "versions"):
            if before[key] != document[key]:
                sys.exit(f"{path} is of {key} {before[key]}, not {document[key]}: run all of its commands anew")
        document["command"] = f"{before['command']}\n{document['command']}"
        commits = [*(before["commit"] or "").split(", "), document["commit"] or ""]
        document["commit"] = ", ".join(dict.fromkeys(filter(None, commits))) or None
    elif before is not None and extend:
        require_same_run(path, before, document)
        *_, last = commands = before["command"].splitlines()
        document["command"] = "\n".join(commands if document["command"] == last else [*commands, document["command"]])
        if settings := merged_settings(before.get("settings", {}), document.get("settings", {})):
            document["settings"] = settings
        document["rows"] = before["rows"] + document["rows"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(document), encoding="utf-8")


def read_results(args: argparse.Namespace, packages: Sequence[str] = PACKAGES) -> list[dict[str, Any]]:
    """Return the rows that are to be extended, of what --json or else --keep names; none where there is no file.

    SystemExit where they are of another commit, machine or set of versions: before anything is measured.
    """
    path = args.json or (args.keep and RESULTS / f"{args.keep}.json")
    if not path or not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    require_same_run(path, before, describe("", [], packages=packages))
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def require_same_run(path: Path, before: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """Raise SystemExit where two documents are not of one commit, machine and set of versions."""
    for key in ("machine", "versions", "commit"):
        if before[key] != document[key]:
            sys.exit(f"{path} is of {key} {before[key]}, not {document[key]}: run all of its commands anew")


def merged_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of two commands: the later one's, but objects of both with the keys of both."""
    both = {key: {**before[key], **now[key]} for key in now if isinstance(now[key], dict) and key in before}
    return {**before, **now, **both}


def describe(
    question: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    packages: Sequence[str] = PACKAGES,
    versions: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the document that is written.

    packages: whose versions to note, where they are installed. versions: others, such as another environment's.
    settings: what else was chosen or found, such as a seed or the kernels that vLLM took.
    """
    document: dict[str, Any] = {
        "question": question,
        "command": command_line(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **installed(packages), **(versions or {})},
    }
    if settings:
        document["settings"] = dict(settings)
    return document | {"rows": [dict(row) for row in rows]}


def dumps(document: Mapping[str, Any]) -> str:
    """Return JSON with one line a row, so that git shows which figures changed, of six digits each."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    short_rows = [{key: short(value) for key, value in row.items()} for row in document["rows"]]
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in short_rows)
    head = json.dumps({**document, "rows": []}, indent=2, ensure_ascii=False)
    return head.replace('"rows": []', f'"rows": [\n{rows}\n  ]') + "\n"


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Return the command that runs, to be pasted in the repository, without the options of NOT_REPEATED."""
    script, *rest = sys.argv if arguments is None else arguments
    path = Path(script).resolve()
    words = ["python", str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else script]
    skip = False
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in NOT_REPEATED:
            skip = not equals
        elif skip:
            skip = False
        elif word not in {"--extend", "--append"}:
            words.append(word)
    return shlex.join(words)


def commit(checkout: Path = ROOT) -> str | None:
    """Return the short hash of a checkout's commit, with "+changes" if MEASURED differs from it; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *MEASURED)
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Return the processor's model, the cores that this process may use, memory in GiB, and the GPUs or None."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "gpu": gpus(),
    }


def gpus() -> str | None:
    """Return the names of the GPUs that can be used, such as "2 × NVIDIA H200"; None if there is none."""
    torch = sys.modules.get("torch")
    if torch is not None:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    elif shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    else:
        names = []
    counts = {name: names.count(name) for name in names if name}
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in counts.items()) or None


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed; of imported ones what they say themselves."""
    found = {}
    for name in packages:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = str(getattr(sys.modules.get(name), "__version__", version))
    return found


def line(document: Mapping[str, Any]) -> str:
    """Return machine, versions, commit and date of a document in one line."""
    about, versions = document["machine"], document["versions"]
    cores, memory = about.get("cores"), about.get("memory_gib")
    where = [about.get("gpu"), about.get("cpu"), cores and f"{cores} cores", memory and f"{memory} GiB"]
    software = [f"{'Python' if name == 'python' else name} {version}" for name, version in versions.items()]
    known = {
        "machine": ", ".join(filter(None, where)),
        "versions": ", ".join(software),
        "commit": f"commit {document['commit']}" if document["commit"] else "",
        "date": document["date"] or "",
    }
    *unknown, last = [name for name, text in known.items() if not text] or [""]
    missing = f"{', '.join(unknown)}{' and ' if unknown else ''}{last} not recorded" if last else ""
    return "; ".join(filter(None, [*known.values(), missing]))
