"""What the GPU scripts share: vLLM engines in subprocesses that know the plugin, tables, how a script ends."""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from results import VLLM_PACKAGES, line, save

ROOT = Path(__file__).resolve().parents[2]


def plugin_environment(plugins: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which vLLM's processes find this checkout and its entry point.

    Where the package is installed, that is the environment as it is. Where it only lies on PYTHONPATH, a directory
    with the metadata that an installation would have written is put beside it. plugins: more of vLLM's plugins, name →
    module and function, of the modules beside this one.
    """
    env = dict(os.environ)
    paths = [str(ROOT)]
    points = dict(plugins or {})
    if points:
        paths.append(str(Path(__file__).parent))
    known = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "w4a8_lut" not in known:
        points["w4a8_lut"] = "convert_w4a8.vllm_plugin:register"
    if points:
        site = Path(tempfile.mkdtemp(prefix="w4a8-plugin-"))
        info = site / "w4a8_convert_checkout-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: w4a8-convert-checkout\nVersion: 0\n")
        lines = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{lines}")
        paths.append(str(site))
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    env.setdefault("HF_HUB_OFFLINE", "1")
    # Greedy decoding needs no FlashInfer sampler, which wants a CUDA toolkit to compile itself.
    env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    return env


def run_worker(
    script: str,
    payload: dict[str, Any],
    timeout: float = 420,
    environment: Mapping[str, str] | None = None,
    plugins: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `script --worker PAYLOAD RESULT` in a process of its own and return what it wrote to RESULT.

    plugins: as `plugin_environment` takes them. Beside what was written: `wall_s`, and `kernels`, the lines in which
    vLLM's log names the kernels that it chose. Raises RuntimeError with the end of the log if the process fails or
    takes longer than `timeout` seconds before it wrote anything.
    """
    with tempfile.TemporaryDirectory(prefix="w4a8-engine-") as directory:
        ask, answer, log = (Path(directory) / name for name in ("payload.json", "result.json", "log.txt"))
        ask.write_text(json.dumps(payload))
        command = [sys.executable, script, "--worker", str(ask), str(answer)]
        start = time.perf_counter()
        with log.open("wb") as output:
            try:
                env = plugin_environment(plugins) | dict(environment or {})
                code = subprocess.run(
                    command, stdout=output, stderr=output, env=env, timeout=timeout, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        seconds = time.perf_counter() - start
        text = log.read_text(errors="replace")
        if not answer.is_file():  # one that is there counts, however the engine's shutdown went
            tail = "\n".join(text.splitlines()[-60:])
            raise RuntimeError(f"engine process ended with {code} after {seconds:.0f} s\n{tail}")
        if code:
            print(f"engine process ended with {code} after {seconds:.0f} s; what it wrote is kept", flush=True)
        result: dict[str, Any] = json.loads(answer.read_text())
        kernels = sorted(set(re.findall(r"Using \S+ (?:for \w+|.*backend\b)", text)))
        return result | {"wall_s": round(seconds, 1), "kernels": kernels}


def start(worker: Callable[[dict[str, Any]], Any], main: Callable[[], int]) -> None:
    """Run a script: its worker where `run_worker` called it, otherwise its main part, which ends the process.

    worker: returns what it found; or yields, again and again, what it has found so far.
    """
    if sys.argv[1:2] != ["--worker"]:
        sys.exit(main())
    found = worker(json.loads(Path(sys.argv[2]).read_text()))
    answer = Path(sys.argv[3])
    part = answer.with_suffix(".part")
    for result in [found] if isinstance(found, dict) else found:
        part.write_text(json.dumps(result))
        part.replace(answer)


def token_by_token(batch: int) -> dict[str, int]:
    """Return vLLM's options by which prompts are read as text is generated: one token of each request in a step.

    All that a layer sees is at most `batch` rows, and attention reads the cache.
    """
    return {"max_num_seqs": batch, "max_num_batched_tokens": batch, "long_prefill_token_threshold": 1}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns."""
    cells = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def table_of_numbers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same names as a table, microseconds and other numbers without decimals."""
    header = [name.removesuffix("_us") for name in rows[0]]
    return table(header, [[f"{v:.0f}" if isinstance(v, float) else v for v in row.values()] for row in rows])


def finish(
    args: argparse.Namespace,
    question: str,
    rows: Sequence[Mapping[str, Any]],
    text: str,
    *,
    extend: bool = False,
    merged: bool = False,
    **settings: Any,
) -> None:
    """Write the rows as JSON where asked, and print the machine, the versions and the table last."""
    document = save(args, question, rows, packages=VLLM_PACKAGES, settings=settings, extend=extend, merged=merged)
    print(f"\n{line(document)}\n{text}")
