"""The zoo in this process, which `scripts/run_zoo.py` starts with one version of vLLM on its path.

    python -m zoo run [--json FILE] [NAME ...]    # tiny models of these architectures, or of all
    python -m zoo check [--json FILE] DIR ...     # checkpoints on disk
    python -m zoo compare [--json FILE] OUT MODEL ...   # outputs on disk, each with the model in 16 bits

One line an output on stdout; the rows of `judge.Row` as JSON in FILE.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from zoo import stand_ins
from zoo.rows import BAD, NOT_BUILT, Row


def main() -> int:
    """Run what is asked for; exit with 1 if anything is not right."""
    parser = argparse.ArgumentParser(prog="zoo")
    parser.add_argument("action", choices=("run", "check", "compare"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stand_ins.claim_cpu_build()
    stand_ins.define_torchvision_ops()
    stand_ins.define_vllm_ops()
    stand_ins.replace_vllm_kernels()
    from zoo import engine, judge, models, reference, sources
    from zoo.architectures import ARCHITECTURES

    def make_tiny(name: str, work: Path) -> Path:
        models.build(ARCHITECTURES[name], work / "saved")
        sources.write_pair(work / "saved", work / "source", work / "twin", ARCHITECTURES[name])
        return work / "source"

    def read(name: str, work: Path) -> Path:
        reference.write_twin(Path(name), work / "twin")
        return Path(name)

    prepare: Callable[[str, Path], Path] = make_tiny if args.action == "run" else read
    models.silence()
    engine.prepare()
    rows = []
    if args.action == "compare":
        for out, model in zip(args.names[::2], args.names[1::2], strict=True):
            rows += judge.judge_output(Path(out).name, Path(out), Path(model))
        args.names = []
        args.action = "compared"
    for name in args.names or (ARCHITECTURES if args.action == "run" else ()):
        start = time.perf_counter()
        work = Path(tempfile.mkdtemp(prefix="zoo-"))
        try:
            source = prepare(name, work)
            new = judge.judge(name, source, work / "twin", work)
        except Exception as error:  # noqa: BLE001 (transformers', of settings that do not go together)
            new = [Row(name, "", "", 0, NOT_BUILT, judge.brief(error))]
        finally:
            shutil.rmtree(work, ignore_errors=True)
        rows += new
        lines = [f"{name} ({time.perf_counter() - start:.1f} s)"]
        for row in new:
            counts = f"{row.int4} of {row.weights} weights in INT4" if row.weights else ""
            words = (f"    {row.format} {row.scales} TP {row.tp}: {row.status}", counts, row.options, row.reason)
            lines.append("; ".join(filter(None, words)))
        print(*lines, sep="\n", flush=True)  # noqa: T201
    if args.json:
        text = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
        args.json.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    return int(any(row.status in BAD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
