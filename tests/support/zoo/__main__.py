"""Run the zoo in this process: see scripts/zoo.py."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from zoo import stand_ins
from zoo.architectures import ARCHITECTURES, Architecture


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stand_ins.define_torchvision_ops()
    import transformers
    from zoo import engine, judge, models, sources

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    engine.prepare()
    rows = []
    for name in args.types or ARCHITECTURES:
        start = time.perf_counter()
        work = Path(tempfile.mkdtemp(prefix=f"zoo-{name}-"))
        try:
            models.build((ARCHITECTURES.get(name) or Architecture(name)), work / "saved")
            quantized = sources.write_pair(work / "saved", work / "source", work / "twin")
            new = judge.judge(name, work / "source", work / "twin", work)
        except Exception as error:
            print(name, "BUILD", judge.brief(error))
            continue
        finally:
            shutil.rmtree(work, ignore_errors=True)
        rows += new
        print(f"{name}: {len(quantized)} quantized, {time.perf_counter() - start:.1f} s")
        for row in new:
            print("  ", row.format, row.scales, row.tp, row.status, row.int4, row.weights, row.options, row.reason)
        sys.stdout.flush()
    if args.json:
        args.json.write_text(judge.dump(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
