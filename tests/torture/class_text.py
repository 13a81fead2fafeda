# ruff: noqa: PTH102, PTH104, PTH118, PTH123, PTH211  (names as bytes)
r"""Text that is none, or speaks to somebody: the terminal, Markdown, HTML, matplotlib, the file system.

In names of tensors, settings, their names, patterns, metadata, cards, file names, paths, and ids of the Hub.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from class_numbers import _places, _put
from fuzz_mutations import read_raw, shards, write_raw
from judge import Case

TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "...",
        "-",
        "--help",
        "/",
        "//",
        "a/b",
        "../x",
        "~",
        "~nosuchuser",
        "\\",
        "%s%n",
        "{0}",
        "$HOME",
    ),
    *("\x00", "a\x00b", "\n", "a\nb", "\r", "a\rb", "\t", "\x07", "\x7f", "\x1b[2J", "\x1b]0;owned\x07", "\x9b31m"),
    *("\x1b[32mOK: every tensor and file of the source is accounted for\x1b[0m", "x\nOK: all is well\ny"),
    *("\u202eevil", "\u2066x\u2069", "\u200b", "\ufeff", "\u2028", "\u2029", "\x85", "e\u0301", "ﷺ" * 50, "\U0010ffff"),
    *("\ud800", "x\udcff", "\ud83d", "\udc80" * 10, "😀", "٤", "४५", "²", "①", "1" * 5000, "layers.٤.x", "x" * 70_000),
    *(
        r"$\frac{$",
        r"$x$",
        r"$$",
        r"\$",
        r"$\alpha",
        "^_{",
        "<script>alert(1)</script>",
        '"><img src=x>',
        "&amp;",
        "`|x|`",
    ),
    *(
        "](javascript:alert(1))",
        "---",
        "- x: y",
        "!!python/object:os.system",
        "*a &a",
        "'",
        '"',
        "re:(",
        "re:[",
        "re:(a+)+$",
    ),
    *(
        "re:.*",
        "+:.*",
        "-:.*",
        "(?P<x>",
        "(?#",
        "a{1,99999999999}",
        "\\",
        "(" * 300 + ")" * 300,
        "None",
        "null",
        "True",
    ),
    *("model.safetensors", ".w4a8-partial", "con", "__metadata__", "__class__", "README.md", "x.bin", "İ", "ß"),
)
_BYTES = (
    b"\xff\xfe",
    b"caf\xe9",
    b"a\nb",
    b"\x1b[2Jx",
    b"\xe2\x80\xaex",
    b"$x$",
    b" ",
    b"-x",
    b"x" * 240,
    b"a\xc3",
    b"<b>",
    b"`|`",
    b"\\",
)
"""File names as the system has them."""


def _unescaped(document: object, rng: random.Random) -> bytes:
    """Return JSON whose text is escaped, or written as it is where it can be."""
    escaped = json.dumps(document).encode()
    if rng.random() < 0.5:
        return escaped
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def tensor_names(source: Path, rng: random.Random) -> str:
    """Put texts into the names of whole modules, of single tensors, or into metadata."""
    path = rng.choice(shards(source))
    header, data = read_raw(path)
    text = rng.choice(TEXTS)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    module = name.rpartition(".")[0]
    part = rng.choice(module.split(".") or [""])
    match rng.randrange(5):
        case 0:
            changed = {n: n.replace(f"{module}.", f"{module[: module.rfind('.') + 1]}{text}_proj.") for n in names}
        case 1:
            changed = {n: n.replace(part, text, 1) for n in names}
        case 2:
            changed = {name: text}
        case 3:
            changed = {n: n.removeprefix(module + ".") for n in names if n.startswith(module + ".")}
        case _:
            header["__metadata__"] = rng.choice(({text: text}, {text: text, "format": "pt"}, text, {"format": text}))
            changed = {}
    header = {changed.get(n, n): entry for n, entry in header.items()}
    write_raw(path, _unescaped(header, rng), data)
    index = source / "model.safetensors.index.json"
    if index.exists() and rng.random() < 0.8:
        document = json.loads(index.read_text())
        document["weight_map"] = {
            changed.get(n, n) if file == path.name else n: file for n, file in document["weight_map"].items()
        }
        index.write_bytes(_unescaped(document, rng))
    return f"{path.name}: {name} → {text[:30]!r}"


def settings(source: Path, rng: random.Random) -> str:
    """Put texts into settings, or into their names."""
    files = [
        path for name in ("quantize_config.json", "model.safetensors.index.json") if (path := source / name).exists()
    ]
    path = rng.choice([source / "config.json"] * 3 + files)
    document: Any = json.loads(path.read_text())
    places = list(_places(document))
    quantization = [place for place in places if place[0] == "quantization_config"]
    place = rng.choice(quantization if quantization and rng.random() < 0.6 else places)
    text = rng.choice(TEXTS)
    form: Callable[[str], Any] = rng.choice(
        (str, lambda t: [t], lambda t: {t: t}, lambda t: [{t: [t]}], lambda t: {"x": t})
    )
    if rng.random() < 0.4:
        place = (
            *place[:-1],
            rng.choice((text, "architectures", "model_type", "dynamic", "version", "ignore", "_name_or_path")),
        )
    try:
        _put(document, place, form(text))
    except (TypeError, IndexError):
        document[text] = form(text)
    path.write_bytes(_unescaped(document, rng))
    return f"{path.name}: {'.'.join(map(str, place))[:60]} = {text[:30]!r}"


def card(source: Path, rng: random.Random) -> str:
    """Write a card whose metadata and text try to break out."""
    keys = ("license", "license_name", "license_link", "language", "base_model", "tags", "pipeline_tag", "widget")
    text = rng.choice(TEXTS)
    quoted = yaml.safe_dump(text, default_style='"') if text.isprintable() else text
    front = "\n".join(f"{key}: {rng.choice((text, [text], quoted))}" for key in keys)
    content = f"---\n{front}\n---\n# {text}\n{text}\n---\n{text}"
    (source / "README.md").write_bytes(content.encode("utf-8", "surrogatepass"))
    return f"README.md: {text[:30]!r}"


def file_names(source: Path, rng: random.Random) -> str:
    """Add side files, or rename weights, to names that are not UTF-8 or speak."""
    name = rng.choice(_BYTES)
    root = os.fsencode(source)
    if rng.random() < 0.3:
        os.mkdir(os.path.join(root, name))
        name = os.path.join(name, rng.choice(_BYTES))
    if rng.random() < 0.2:
        os.symlink(rng.choice(_BYTES), os.path.join(root, name))
    elif rng.random() < 0.3 and len(shards(source)) == 1:
        os.rename(shards(source)[0], os.path.join(root, name + b".safetensors"))
    else:
        with open(os.path.join(root, name + rng.choice((b"", b".json", b".py"))), "wb") as file:
            file.write(b"x")
    return f"file name {name!r}"


def text(place: Path, base: Path, rng: random.Random, needs: list[str]) -> Case:
    """Make a case of this class."""
    source, out = place / "in", place / "out"
    if rng.random() < 0.12:
        return _named_path(place, base, rng, needs)
    change = rng.choice((tensor_names, tensor_names, settings, settings, settings, card, file_names))
    said = change(source, rng)
    convert = ["convert", str(source), str(out), "--device", "cpu", *needs]
    extra = rng.choice(([], [], ["--quiet"], ["--json"], ["--dry-run"], ["--format", "compressed-tensors"]))
    json_too = ["--json"] * rng.randrange(2)
    if rng.random() < 0.6:
        return Case(said, [*convert, *extra], (out,))
    match rng.randrange(4):
        case 0:
            return Case(said, ["inspect", str(source), *json_too], ())
        case 1:
            return Case(said, ["check", str(source), "--device", "cpu", *needs, *json_too], ())
        case 2:
            return Case(said, ["verify", str(base / "out"), "--source", str(source), *json_too], (), (base,))
        case _:
            # with pictures: names go into HTML and matplotlib
            html = place / "report.html"
            return Case(
                said, ["report", str(base / "out"), "--source", str(source), "--html", str(html)], (html,), (base,)
            )


def _named_path(place: Path, base: Path, rng: random.Random, needs: list[str]) -> Case:
    """Give directories and files such names, and ids that are none."""
    name = os.fsdecode(rng.choice(_BYTES))
    kind = rng.randrange(4)
    if kind == 0:
        target = place / name
        os.rename(place / "in", target)
        command = rng.choice(
            (["inspect", str(target)], ["convert", str(target), str(place / "out"), "--device", "cpu", *needs])
        )
        return Case(f"IN is {name!r}", [*command, *["--json"] * rng.randrange(2)], (place / "out",), (target,))
    if kind == 1:
        out = place / name
        command = ["convert", str(place / "in"), str(out), "--device", "cpu", *needs, *["--json"] * rng.randrange(2)]
        return Case(f"OUT is {name!r}", command, (out,))
    if kind == 2:
        html = place / (name + ".html")
        return Case(
            f"--html {name!r}",
            ["report", str(base / "out"), "--source", str(place / "in"), "--html", str(html)],
            (html,),
            (base,),
        )
    text = rng.choice([t for t in TEXTS if "\x00" not in t and len(t) < 3000])
    ids = rng.choice((f"{text}/{text}", f"org/{text}", f"{text}/name@{text}", f"org/name@{text}", text))
    command = rng.choice((["inspect", ids], ["check", ids, "--sample"], ["convert", ids, str(place / "out")]))
    # A text may be a path that exists, such as "/" or ".".
    return Case(f"id {ids[:60]!r}", [*command, *["--json"] * rng.randrange(2)], (place / "out",), (Path("/"),))
