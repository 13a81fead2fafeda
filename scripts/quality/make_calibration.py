"""Write calibration text: windows of the Python standard library's own sources, as JSONL with a key `text`.

    make_calibration.py MODEL FILE [--windows 64] [--window 512] [--unlike heldout_text.txt] [--seed 0]

MODEL is a directory with a tokenizer. Each line becomes one window: at least --window tokens of one place of one file,
so that a quantizer that cuts to --window tokens reads that many. At most --per-file windows come from a file. The files
are those of the interpreter that runs this, without its tests; with the same interpreter, tokenizer and options the
same bytes are written.

Evaluation text must not be calibrated on: a file of which more than --share of the longer lines stand in a text of
--unlike is left out, and afterwards a line says how many n-grams of --ngram tokens of the windows occur in it all the
same.
"""

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

LONG_LINE = 25
"""Characters from which on a line says something of where it comes from."""
LEAST_LINES = 20
"""Long lines that a file has to have."""
SPARE_TOKENS = 8
"""How many tokens more a piece may take where its first tokens alone encode to fewer."""
CHARACTERS_PER_TOKEN = 8
"""More than tokens of source text are long, on average, so that a piece holds enough of them."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""


class HubTokenizer:
    """A checkpoint's tokenizer through transformers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def long_lines(text: str) -> list[str]:
    """Return the lines of a text that say something of where it comes from."""
    lines = (line.strip() for line in text.replace("\0", "\n").split("\n"))
    return [line for line in lines if len(line) >= LONG_LINE]


def unlike(texts: Iterable[str], others: Iterable[str], share: float, least: int = LEAST_LINES) -> list[str]:
    """Return the texts of at least `least` longer lines, of which at most a `share` stand in the others."""
    known = {line for other in others for line in long_lines(other)}
    kept = []
    for text in texts:
        lines = long_lines(text)
        if len(lines) >= least and sum(line in known for line in lines) <= share * len(lines):
            kept.append(text)
    return kept


def library(root: Path) -> Iterator[str]:
    """Yield the sources below a directory in the order of their names, without installed packages and tests."""
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests", "idle_test", "__pycache__"} & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def windows_of(
    texts: Sequence[str], tokenizer: Tokenizer, count: int, window: int, per_file: int, seed: int
) -> list[str]:
    """Return pieces of the texts that are windows of tokens, up to `per_file` in a row from a random place of each.

    The same seed gives the same. A piece encodes to at least `window` tokens by itself: text that is cut where a token
    ends may be read otherwise.

    Raises ValueError where the texts hold fewer windows.
    """
    generator = random.Random(seed)
    order = list(texts)
    generator.shuffle(order)
    found: list[str] = []
    for text in order:
        characters = CHARACTERS_PER_TOKEN * window
        at = generator.randrange(max(1, len(text) - characters))
        ids = tokenizer.encode(text[at : at + 2 * characters * per_file])
        step = window + SPARE_TOKENS
        for start in range(0, per_file * step, step):
            lengths = range(window, min(len(ids) - start, step) + 1)
            pieces = (tokenizer.decode(ids[start : start + length]) for length in lengths)
            found += next(([piece] for piece in pieces if len(tokenizer.encode(piece)) >= window), [])
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"only {len(found)} windows of {window} tokens, not {count}: allow more of a file (--per-file)")


def ngrams(ids: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    """Yield the n-grams of tokens."""
    return (tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))


def overlap(windows: Sequence[Sequence[int]], other: Sequence[int], n: int) -> tuple[int, int]:
    """Return how many n-grams of the windows occur in another text, and how many n-grams there are."""
    known: Collection[tuple[int, ...]] = set(ngrams(other, n))
    all_of_them = [gram for window in windows for gram in ngrams(window, n)]
    return sum(gram in known for gram in all_of_them), len(all_of_them)


def print_overlap(
    windows: Sequence[Sequence[int]], paths: Sequence[Path], others: Sequence[str], tokenizer: Tokenizer, n: int
) -> None:
    """Print for each of other texts how many n-grams of the windows occur in it."""
    for path, text in zip(paths, others, strict=True):
        same, total = overlap(windows, tokenizer.encode(text.replace("\0", "\n")), n)
        print(f"{same} of {total} n-grams of {n} tokens ({same / total:.2%}) occur in {path.name}")


def main() -> int:
    """Write the windows, and say what they have in common with evaluation text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory with a tokenizer")
    parser.add_argument("out", type=Path, help="JSONL file to write")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="tokens a window")
    parser.add_argument("--per-file", type=int, default=2, help="the most windows of one file")
    parser.add_argument("--unlike", type=Path, nargs="*", default=[], help="evaluation texts (documents end at NUL)")
    parser.add_argument("--share", type=float, default=0.02, help="of a file's longer lines that may stand in these")
    parser.add_argument("--ngram", type=int, default=12, help="tokens of the n-grams that are looked for in these")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = HubTokenizer(args.model)
    others = [path.read_text(encoding="utf-8") for path in args.unlike]
    texts = list(library(Path(sysconfig.get_paths()["stdlib"])))
    kept = unlike(texts, others, args.share)
    try:
        windows = windows_of(kept, tokenizer, args.windows, args.window, args.per_file, args.seed)
    except ValueError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in windows)
    ids = [tokenizer.encode(text)[: args.window] for text in windows]
    print(f"{len(kept)} of {len(texts)} files, {len(windows)} windows of {args.window} tokens: {args.out}")
    print_overlap(ids, args.unlike, others, tokenizer, args.ngram)
    return 0


if __name__ == "__main__":
    sys.exit(main())
