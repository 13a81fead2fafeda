"""Write the tables of docs/reference/vllm-models.md from the modules that hold them.

python scripts/vllm_models.py            # rewrite the document
python scripts/vllm_models.py --check    # fail where it is not current
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from convert_w4a8.checkpoint.vllm_layers import MERGED, UNQUANTIZED
from convert_w4a8.checkpoint.vllm_loaders import KEPT, TOUCHED, Touched

DOCUMENT = Path(__file__).parents[1] / "docs" / "reference" / "vllm-models.md"
_BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables() -> Mapping[str, str]:
    """Return the tables by the names of their places in the document."""
    return {
        "touched": _touched(row for row in TOUCHED if not row.split),
        "split": _touched(row for row in TOUCHED if row.split),
        "kept": _table(
            ("models", "layers", "why", "seen in"),
            ((_models(row.models), _code(row.modules), row.reason, _code(row.file)) for row in KEPT),
        ),
        "unquantized": _table(
            ("layers", "models", "names"),
            ((row.what, _models(row.models), _code(row.modules)) for row in UNQUANTIZED),
        ),
        "merged": _table(
            ("models", "layers", "into"),
            ((_models(row.models), ", ".join(map(_code, row.shards)), _code(row.name)) for row in MERGED),
        ),
    }


def current(text: str) -> str:
    """Return the document with the tables of today."""
    found = tables()
    return _BLOCK.sub(lambda match: f"{match[1]}{found[match[2]]}{match[3]}", text)


def _touched(rows: Iterable[Touched]) -> str:
    def line(row: Touched) -> Sequence[str]:
        effects = [str(row.effects.get(name, "right")) for name in ("lut", "compressed-tensors")]
        settings = f"; only where one of {', '.join(map(_code, row.settings))} is 1" if row.settings else ""
        remedy = "yes" if row.remedy else "no"
        return _models(row.models), _code(row.modules), *effects, row.reason + settings, _code(row.file), remedy

    return _table(
        ("models", "layers", "`lut`", "`compressed-tensors`", "why", "seen in", "right in BF16"), map(line, rows)
    )


def _models(names: tuple[str, ...]) -> str:
    classes = [name for name in names if name[0].isupper()]
    return ", ".join(map(_code, classes or names)) or "all"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "all"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Rewrite the document, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the document is not current")
    check = parser.parse_args().check
    text = DOCUMENT.read_text(encoding="utf-8")
    if check and current(text) != text:
        sys.exit(f"{DOCUMENT} is not current: run scripts/vllm_models.py")
    if not check:
        DOCUMENT.write_text(current(text), encoding="utf-8")


if __name__ == "__main__":
    main()
