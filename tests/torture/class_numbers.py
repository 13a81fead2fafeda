"""Numbers that no arithmetic takes, in every place of an input that holds one, and in every option that takes one."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz_mutations import read_raw, shards, write_raw
from judge import Case

MARK = "\x00number\x00"
"""Stands in a document for a number that Python's json would not write."""
DIGITS = "9" * 5000
"""More than `int` converts, and than an f-string renders."""
NUMBERS = (
    *("0", "-1", "1", "3", "4", "5", "8", "127", "128", "129", "-128", "0.5", "-0.0", "4.0", "128.0", "1e2"),
    *("2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616", "-2147483649"),
    *("1" + "0" * 30, "1" + "0" * 300, "1" + "0" * 4299, "1e308", "1e400", "-1e400", "1e-400", "NaN", "Infinity"),
    *("-Infinity", DIGITS, "-" + DIGITS, "0." + DIGITS, "1e" + DIGITS, "1E-" + "9" * 18),
    *('"4"', '"128"', '"٤"', f'"{DIGITS}"', '"NaN"', '"0x80"', '"1_28"', '""', '" 4"'),
    *("true", "false", "null", "[]", "[4]", "[[[4]]]", "{}", '{"4": 4}', "[null]", "[1e400]", f"[{DIGITS}]"),
)
"""As JSON writes them: huge, tiny, negative, fractions, none, strings, booleans, and what is no number at all."""

_KNOWN = {
    "": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "model": ("head_dim", "vocab_size", "num_experts", "num_local_experts", "moe_intermediate_size", "rms_norm_eps"),
    "other": ("architectures", "model_type", "dtype", "torch_dtype", "tie_word_embeddings", "quantization_config"),
    "awq": ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "modules_to_not_convert"),
    "gptq": ("bits", "group_size", "desc_act", "sym", "static_groups", "checkpoint_format", "dynamic", "damp_percent"),
    "ct": ("config_groups", "ignore", "format", "sparsity_config", "transform_config", "kv_cache_scheme"),
}
"""Settings that a document may lack, and that somebody reads."""


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))


def _put(document: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def _render(document: Any, numbers: list[str]) -> str:
    text = json.dumps(document)
    for number in numbers:
        text = text.replace(json.dumps(MARK), number, 1)
    return text


def damage_json(path: Path, rng: random.Random) -> str:
    """Put one to three numbers into a JSON file; return what and where."""
    document = json.loads(path.read_text())
    places = list(_places(document))
    nested = [place for place in places if place[0] in ("quantization_config", "layers")]
    said, count = [], rng.choice((1, 1, 2, 3))
    for _ in range(count):
        place = rng.choice(nested if nested and rng.random() < 0.6 else places)
        if rng.random() < 0.25:
            place = (*place[:-1], rng.choice(rng.choice(list(_KNOWN.values()))))
        try:
            _put(document, place, MARK)
        except (TypeError, KeyError, IndexError):  # within what was replaced before
            continue
        said.append(".".join(map(str, place)))
    numbers = [rng.choice(NUMBERS) for _ in range(json.dumps(document).count(json.dumps(MARK)))]
    path.write_text(_render(document, numbers), encoding="utf-8")
    return f"{path.name}: {said} = {[n[:12] for n in numbers]}"


def damage_header(path: Path, rng: random.Random) -> str:
    """Put numbers into a safetensors header."""
    header, data = read_raw(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    place = rng.choice(
        (("shape",), ("data_offsets",), ("shape", 0), ("data_offsets", 0), ("data_offsets", 1), ("dtype",))
    )
    if rng.random() < 0.2:
        entry["shape"] = [MARK] * rng.choice((1, 3, 65, 3000))
    else:
        _put(entry, place, MARK)
    count = json.dumps(header).count(json.dumps(MARK))
    number = rng.choice(NUMBERS)
    write_raw(path, _render(header, [number] * count).encode(), data)
    return f"{path.name}: {name}.{place} = {number[:12]} ({count} times)"


_OPTIONS = ("--max-shard-size", "--workers", "--min-sqnr-db", "--tolerance-db", "--device")
_GIVEN = (
    *("0", "-1", "1", "0.5", "1e400", "-1e400", "nan", "inf", "-inf", DIGITS, "-" + DIGITS, "1e" + DIGITS, ""),
    *("٤", "४", "1_000", "0x10", "1B", "1kB", "0.0001B", DIGITS + "TB", "9" * 400 + "GiB", "5 GB", "5GBB", "1 0"),
    *("cuda:" + DIGITS, "cuda:-1", "cuda:٤", "cuda:", "cpu:1", "cpu:" + DIGITS, "meta", "99999999999999999999"),
)


def numbers(place: Path, base: Path, rng: random.Random, needs: list[str]) -> Case:
    """Make a case of this class; IN is there already, and `base` is an undamaged conversion of it."""
    source, out = place / "in", place / "out"
    convert = ["convert", str(source), str(out), "--device", "cpu", *needs]
    kind = rng.randrange(10)
    if kind == 0:  # options
        option, value = rng.choice(_OPTIONS), rng.choice(_GIVEN)
        if option in ("--min-sqnr-db", "--tolerance-db"):
            command = ["check", str(source), "--device", "cpu", "--sample", *needs]
        else:
            command = [*convert, "--quiet"]
        return Case(f"{option} {value[:12]}", [*command, f"{option}={value}"], (out,))
    if kind == 1:  # a baseline
        baseline = place / "baseline.json"
        baseline.write_bytes((base / "baseline.json").read_bytes())
        said = damage_json(baseline, rng)
        extra = ["--json"] * rng.randrange(2)
        command = ["check", str(source), "--sample", "--baseline", str(baseline), "--device", "cpu", *needs, *extra]
        return Case(said, command, (), (baseline,))
    if kind == 2:  # an output, looked at afterwards
        out.mkdir()
        for file in (base / "out").iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        said = (
            damage_header(rng.choice(shards(out)), rng) if rng.random() < 0.3 else damage_json(out / "config.json", rng)
        )
        command = rng.choice((["verify"], ["report"], ["inspect"]))
        command = [*command, str(out), *(["--source", str(source)] if command != ["inspect"] else [])]
        return Case("OUT " + said, [*command, *["--json"] * rng.randrange(2)], (), (out,))
    files = [
        path for name in ("quantize_config.json", "model.safetensors.index.json") if (path := source / name).exists()
    ]
    if kind in (3, 4):
        said = damage_header(rng.choice(shards(source)), rng)
    else:
        said = damage_json(rng.choice([source / "config.json", source / "config.json", *files]), rng)
    return Case(said, rng.choice((_look(source, rng), [*convert, *rng.choice(([], ["--quiet"], ["--json"]))])), (out,))


def _look(source: Path, rng: random.Random) -> list[str]:
    command = rng.choice((["inspect"], ["check"], ["convert"]))
    if command == ["convert"]:
        command = ["convert", str(source), "out", "--dry-run"]
    elif command == ["check"]:
        command = ["check", str(source), "--sample", "--device", "cpu"]
    else:
        command = ["inspect", str(source)]
    return [*command, *["--json"] * rng.randrange(2)]
