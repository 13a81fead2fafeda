"""Damage of every kind, one at a time: `verify` finds it, or it is listed as what cannot be found."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import edit_tensors, write_case
from paths import ROOT

from convert_w4a8 import Options, convert, verify
from convert_w4a8.errors import Problem

MODULE = "model.layers.1.mlp.gate_proj"
SOURCES = {"kept": "gptq-v1", "new": "awq-zero-points"}
OUTPUTS: dict[str, dict[str, Any]] = {
    "lut": {"format": "lut"},
    "entries": {"format": "lut", "scales": "direct"},
    "compressed-tensors": {"format": "compressed-tensors"},
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Pair]:
    """Convert a checkpoint whose codes are kept and one whose codes are new into every form of output."""
    root = tmp_path_factory.mktemp("originals")
    pairs = {}
    for codes, case in SOURCES.items():
        source = write_case(case, root / codes).path
        for name, options in OUTPUTS.items():
            out = root / f"{codes}-{name}"
            convert(source, out, Options(**options), device="cpu")
            pairs[codes, name] = source, out
    return pairs


@pytest.fixture
def pair(originals: dict[tuple[str, str], Pair], codes: str, output: str, tmp_path: Path) -> Pair:
    """Return the source, and a copy of the output to be damaged."""
    source, out = originals[codes, output]
    shutil.copytree(out, tmp_path / "out")
    return source, tmp_path / "out"


def problems(pair: Pair) -> tuple[Problem, ...]:
    """Return what `verify` finds."""
    return verify(pair[1], pair[0]).problems


def flip(bit: int) -> Callable[[torch.Tensor], None]:
    """Return damage to one bit of an element in the middle, by its place in the element's bytes."""

    def damage(tensor: torch.Tensor) -> None:
        data = tensor.view(-1).view(torch.uint8)
        first = (tensor.numel() // 2 + (5 if tensor.numel() > 10 else 0)) * tensor.itemsize  # not a table's first
        data[first + bit // 8] ^= 1 << bit % 8

    return damage


def swap(axis: int, width: int = 1) -> Callable[[torch.Tensor], None]:
    """Return damage that exchanges two output channels."""

    def damage(tensor: torch.Tensor) -> None:
        data = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
        first, second = data.narrow(axis, 0, width).clone(), data.narrow(axis, 5 * width, width).clone()
        assert not torch.equal(first, second)
        data.narrow(axis, 0, width).copy_(second)
        data.narrow(axis, 5 * width, width).copy_(first)

    return damage


def zero(axis: int, width: int = 1) -> Callable[[torch.Tensor], None]:
    """Return damage that leaves nothing of an output channel."""

    def damage(tensor: torch.Tensor) -> None:
        data = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
        data.narrow(axis, 3 * width, width).zero_()

    return damage


def double(axis: int, width: int = 1) -> Callable[[torch.Tensor], None]:
    """Return damage that doubles an output channel."""

    def damage(tensor: torch.Tensor) -> None:
        part = (tensor.float().narrow(axis, 3 * width, width) * 2).to(tensor.dtype)
        data, doubled = (x.view(torch.uint8) if x.itemsize == 1 else x for x in (tensor, part))
        data.narrow(axis, 3 * width, width).copy_(doubled)

    return damage


def exchange_codes(tensor: torch.Tensor) -> None:
    """Exchange eight codes with eight others, somewhere."""
    words = tensor.view(-1)
    first, second = 7, int((words != words[7]).nonzero()[3])
    words[[first, second]] = words[[second, first]]


def exchange_two(tensor: torch.Tensor) -> None:
    """Exchange two elements that lie side by side."""
    some = tensor.view(-1)[3:5]
    some.copy_(some.flip(0))


def zero_all(tensor: torch.Tensor) -> None:
    """Leave nothing."""
    tensor.zero_()


def double_all(tensor: torch.Tensor) -> None:
    """Double everything."""
    tensor.mul_(2)


DAMAGE: list[tuple[str, str, str, Callable[[torch.Tensor], None]]] = [
    *(("lut", "weight_packed", f"bit {bit}", flip(bit)) for bit in range(0, 32, 5)),
    ("lut", "weight_packed", "exchanged", exchange_codes),
    ("lut", "weight_packed", "all zero", zero_all),
    ("lut", "weight_packed", "tiles swapped", swap(1, 64)),
    ("lut", "weight_scale", "top exponent bit", flip(6)),
    ("lut", "weight_scale", "exponent bit", flip(3)),
    ("lut", "weight_scale", "sign", flip(7)),
    ("lut", "weight_scale", "swapped", swap(1)),
    ("lut", "weight_scale", "zero", zero(1)),
    ("lut", "weight_scale", "doubled", double(1)),
    ("entries", "weight_lut", "sign", flip(7)),
    ("entries", "weight_lut", "exponent bit", flip(6)),
    ("entries", "weight_lut", "swapped", swap(1, 8)),
    ("entries", "weight_lut", "zero", zero(1, 8)),
    ("entries", "weight_lut", "doubled", double(1, 8)),
    ("lut", "weight_chan_scale", "sign", flip(31)),
    ("lut", "weight_chan_scale", "exponent bit", flip(23)),
    ("lut", "weight_chan_scale", "top exponent bit", flip(30)),
    ("lut", "weight_chan_scale", "swapped", swap(0)),
    ("lut", "weight_chan_scale", "zero", zero(0)),
    ("lut", "weight_chan_scale", "doubled", double(0)),
    *(("compressed-tensors", "weight_packed", f"bit {bit}", flip(bit)) for bit in range(0, 32, 5)),
    ("compressed-tensors", "weight_packed", "exchanged", exchange_codes),
    ("compressed-tensors", "weight_packed", "swapped", swap(0)),
    ("compressed-tensors", "weight_packed", "zero", zero(0)),
    ("compressed-tensors", "weight_scale", "sign", flip(15)),
    ("compressed-tensors", "weight_scale", "exponent bit", flip(7)),
    ("compressed-tensors", "weight_scale", "swapped", swap(0)),
    ("compressed-tensors", "weight_scale", "zero", zero(0)),
    ("compressed-tensors", "weight_scale", "doubled", double(0)),
    ("compressed-tensors", "weight_shape", "bit 0", flip(0)),
    ("compressed-tensors", "weight_shape", "all zero", zero_all),
]


@pytest.mark.parametrize("codes", SOURCES)
@pytest.mark.parametrize(
    ("output", "role", "damage"),
    [pytest.param(output, role, damage, id=f"{output}-{role}-{name}") for output, role, name, damage in DAMAGE],
)
def test_damage_to_one_layer_is_found(pair: Pair, role: str, damage: Callable[[torch.Tensor], None]) -> None:
    """One bit, one channel, one tensor: the layer, and no other, is named."""
    edit_tensors(pair[1], lambda tensors: damage(tensors[f"{MODULE}.{role}"]))
    found = problems(pair)
    assert found
    assert all(problem.subject.startswith(MODULE) for problem in found)


COPIED: dict[str, Callable[[torch.Tensor], None]] = {
    "bit 0": flip(0),
    "bit 7": flip(7),
    "bit 14": flip(14),
    "exchanged": exchange_two,
    "all zero": zero_all,
    "doubled": double_all,
}


@pytest.mark.parametrize("codes", SOURCES)
@pytest.mark.parametrize("output", ["lut"])
@pytest.mark.parametrize("change", COPIED)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_damage_to_a_copied_tensor_is_found(pair: Pair, name: str, change: str) -> None:
    """What is copied is compared byte for byte."""
    edit_tensors(pair[1], lambda tensors: COPIED[change](tensors[name]))
    before = verify(pair[1], pair[0]).problems
    assert [problem.subject for problem in before] in ([name], [])
    if not before:  # the two elements were equal
        assert name == "model.norm.weight"


CANNOT: list[tuple[str, str, str, str, Callable[[torch.Tensor], None]]] = [
    ("kept", "entries", "weight_lut", "last bit", flip(0)),
    ("kept", "lut", "weight_chan_scale", "last bit", flip(0)),
    ("new", "lut", "weight_chan_scale", "last bit", flip(0)),
    ("kept", "compressed-tensors", "weight_scale", "last bit", flip(0)),
]
"""What is within the rounding of FP8: another choice of a scale could have given it. An entry that no code uses, and
the last bit of one FP8 group scale among many, cannot be found either."""


@pytest.mark.parametrize(
    ("codes", "output", "role", "damage"),
    [pytest.param(*case[:3], case[4], id="-".join(case[:4])) for case in CANNOT],
)
def test_what_cannot_be_found_is_no_more_than_a_rounding(
    pair: Pair, role: str, damage: Callable[[torch.Tensor], None]
) -> None:
    """The last bit of one scale: it passes, and costs the layer next to nothing."""
    (before,) = (layer for layer in verify(pair[1], pair[0]).layers if layer.module == MODULE)
    edit_tensors(pair[1], lambda tensors: damage(tensors[f"{MODULE}.{role}"]))
    after = verify(pair[1], pair[0])
    assert after.problems == ()
    (layer,) = (layer for layer in after.layers if layer.module == MODULE)
    assert abs(layer.sqnr_db - before.sqnr_db) < 0.1


# Files.


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the keys that lead to every value in nested objects, and to the objects."""
    if not isinstance(value, dict):
        return [path]
    return ([path] if path else []) + [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["kept"])
@pytest.mark.parametrize("output", ["lut", "compressed-tensors"])
def test_every_key_of_the_configuration_counts(pair: Pair) -> None:
    """Taken away, or changed to something else, each is found; but not what describes the conversion for people."""
    file = pair[1] / "config.json"
    whole = json.loads(file.read_text())
    keys = [key for key in leaves(whole) if key[:2] != ("quantization_config", "conversion")]
    assert len(keys) > 15
    missed = []
    for key in keys:
        for change in ("remove", "change"):
            document = json.loads(json.dumps(whole))
            place = document
            for part in key[:-1]:
                place = place[part]
            if change == "remove":
                del place[key[-1]]
            else:
                place[key[-1]] = [place[key[-1]], "changed"]
            file.write_text(json.dumps(document))
            try:
                found = bool(problems(pair))
            except Exception as error:  # noqa: BLE001 - a refusal is a finding, a bug is not
                found = type(error).__name__ == "ConvertError"
            if not found:
                missed.append((change, *key))
    assert missed == []


ADDED = (
    "pytorch_model.bin",
    "modeling_llama.py",
    "model.pt",
    "sub/x.pkl",
    "a.npz",
    "b.so",
    "extra.ckpt",
    "M.PTH",
    "x.gguf",
)


@pytest.mark.parametrize("codes", ["kept"])
@pytest.mark.parametrize("output", ["lut"])
@pytest.mark.parametrize("name", ADDED)
def test_added_files_that_run_code_fail(pair: Pair, name: str) -> None:
    """Whoever loads the output with another program would run them."""
    (pair[1] / name).parent.mkdir(exist_ok=True)
    (pair[1] / name).write_bytes(b"x")
    assert [problem.subject for problem in problems(pair)] == [name]


@pytest.mark.parametrize("codes", ["kept"])
@pytest.mark.parametrize("output", ["lut"])
def test_other_added_files_are_named(pair: Pair) -> None:
    """They do no harm, and are not the source's."""
    (pair[1] / "notes.txt").write_bytes(b"x")
    found = verify(pair[1], pair[0])
    assert found.problems == ()
    assert found.added == ("notes.txt",)


@pytest.mark.parametrize("codes", ["kept"])
@pytest.mark.parametrize("output", ["lut"])
def test_added_code_in_the_configuration_fails(pair: Pair) -> None:
    """`auto_map` names code that transformers and vLLM would run."""
    file = pair[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "m.M"}}))
    assert [problem.subject for problem in problems(pair)] == ["config.json: auto_map"]


# The table of it.


def damage_table() -> str:
    """Return what is injected here and whether it is found, as Markdown."""
    outputs = {"lut": "`lut`", "entries": "`lut`, `direct`", "compressed-tensors": "`compressed-tensors`"}

    def by_tensor(cases: Iterable[tuple[str, str, str]], found: str) -> list[tuple[str, str, str]]:
        kinds: dict[tuple[str, str], list[str]] = {}
        for output, role, name in cases:
            kinds.setdefault((output, role), []).append(name)
        return [
            (f"`{role}` ({outputs[output]})", ", ".join(dict.fromkeys(names)), found)
            for (output, role), names in kinds.items()
        ]

    rows = [
        *by_tensor((case[:3] for case in DAMAGE), "yes"),
        ("copied tensors", ", ".join(COPIED), "yes"),
        ("config.json", "each key taken away, each changed, `auto_map` added", "yes"),
        ("files", "added: " + ", ".join(f"`{name}`" for name in ADDED), "yes"),
        ("files", "added: others, such as `notes.txt`", "named"),
        *by_tensor((case[1:4] for case in CANNOT), "no"),
        ("`weight_scale`, `weight_lut`", "last bit of one among many; an entry that no code uses", "no"),
        ("config.json", "its block `conversion`, which describes, and decides nothing", "no"),
    ]
    return "\n".join(["| in | damage | found |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def test_the_table_in_the_documents_is_this_one() -> None:
    """What is said to be found, and what not, is what is injected here."""
    text = (ROOT / "docs" / "explanation" / "reliability.md").read_text(encoding="utf-8")
    assert damage_table() in text, damage_table()
