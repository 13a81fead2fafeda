"""Write text to distill on: windows of tokens of source files, as JSONL with a key `input_ids`.

    make_training.py MODEL FILE --root DIR [--suffix .py] [--windows 6000] [--window 512] [--unlike FILE ...] [--seed 0]

MODEL is a directory with a tokenizer; FILE may end in .gz. Windows are taken from files below --root, shuffled by
--seed, at most --per-file of each, from a random place on where it is longer. Files of which more than --share of the
longer lines stand in a text of --unlike (evaluation text, or the JSONL of calibration) are left out, and so are files
that hold the same text as an earlier one, and windows of which more than --overlap of the n-grams stand there. An
--unlike file of `input_ids` is looked through for n-grams only. --parts takes every so many of the shuffled files: with
one seed, text to train on and text to measure on come of different files.
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from make_calibration import CHARACTERS_PER_TOKEN, LEAST_LINES, HubTokenizer, ngrams, print_overlap, unlike

NGRAM = 12
"""Tokens of the n-grams that are looked for in evaluation text."""


def read_other(path: Path) -> str:
    """Return what a text, or a JSONL file with a key `text`, holds; nothing of one of `input_ids`."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return "\n".join(json.loads(line).get("text", "") for line in content.splitlines())
    return content


def read_ids(path: Path) -> list[list[int]]:
    """Return the windows of a JSONL file with a key `input_ids`; none of another file."""
    if path.suffix != ".jsonl":
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [found for line in lines if (found := json.loads(line).get("input_ids"))]


def main() -> int:
    """Write the windows, and say what they have in common with evaluation text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory with a tokenizer")
    parser.add_argument("out", type=Path, help="JSONL file to write, .gz or not")
    parser.add_argument("--root", type=Path, nargs="+", required=True, help="directories to read source files of")
    parser.add_argument("--suffix", nargs="+", default=[".py"])
    parser.add_argument("--windows", type=int, default=6000)
    parser.add_argument("--window", type=int, default=512, help="tokens a window")
    parser.add_argument("--per-file", type=int, default=4, help="the most windows of one file")
    parser.add_argument("--skip", nargs="*", default=[], help="folders to leave out, by name")
    parser.add_argument("--unlike", type=Path, nargs="*", default=[], help="texts not to train on")
    parser.add_argument("--share", type=float, default=0.02, help="of a file's longer lines that may stand in these")
    parser.add_argument("--least-lines", type=int, default=LEAST_LINES, help="longer lines that a file has to have")
    parser.add_argument("--overlap", type=float, default=0.02, help="of a window's n-grams that may occur in these")
    parser.add_argument("--parts", type=int, nargs="*", help="of --of, of the shuffled files (default: all)")
    parser.add_argument("--of", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = HubTokenizer(args.model)
    others = [read_other(path) for path in args.unlike]
    known = {gram for text in others for gram in ngrams(tokenizer.encode(text.replace("\0", "\n")), NGRAM)}
    known |= {gram for path in args.unlike for window in read_ids(path) for gram in ngrams(window, NGRAM)}
    generator = random.Random(args.seed)
    paths = sorted({path for root in args.root for suffix in args.suffix for path in root.rglob(f"*{suffix}")})
    paths = [path for path in paths if not set(args.skip) & set(path.parts)]
    generator.shuffle(paths)
    if args.parts is not None:
        paths = [path for place, path in enumerate(paths) if place % args.of in args.parts]
    windows: list[list[int]] = []
    files = 0
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    for text in dict.fromkeys(unlike(texts, others, args.share, args.least_lines)):
        if len(windows) >= args.windows:
            break
        characters = CHARACTERS_PER_TOKEN * args.window
        at = generator.randrange(max(1, len(text) - characters)) if args.per_file * characters < len(text) else 0
        ids = tokenizer.encode(text[at : at + characters * args.per_file])
        found = [ids[i : i + args.window] for i in range(0, len(ids) - args.window + 1, args.window)][: args.per_file]
        most = args.overlap * (args.window - NGRAM + 1)
        found = [ids for ids in found if sum(gram in known for gram in ngrams(ids, NGRAM)) <= most]
        files += bool(found)
        windows += found
    generator.shuffle(windows)
    windows = windows[: args.windows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"input_ids": ids}, separators=(",", ":")) + "\n" for ids in windows).encode()
    args.out.write_bytes(gzip.compress(content, mtime=0) if args.out.suffix == ".gz" else content)
    print(f"{files} of {len(paths)} files, {len(windows)} windows of {args.window} tokens: {args.out}")
    print_overlap(windows, args.unlike, others, tokenizer, NGRAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
