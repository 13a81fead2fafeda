"""Ways to damage the weights of a checkpoint, each with what a converter may do about it.

A mutation changes a checkpoint directory in place and returns an `Expect`. Its files are real in format; the weights
are random.
"""

import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Expect:
    """What must happen: names, of which one must be in the message; refused, or else maybe converted after all."""

    names: tuple[str, ...]
    refused: bool = True


Mutation = Callable[[Path, random.Random], Expect]


# Files.


def shards(root: Path) -> list[Path]:
    """Return the weight files."""
    return sorted(root.glob("*.safetensors"))


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a file's header and the bytes behind it."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes, length: int | None = None) -> None:
    """Write a file with any header, and with any length before it."""
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def pick(root: Path, rng: random.Random, *suffixes: str) -> tuple[Path, str] | None:
    """Return a file and one of its tensors whose name ends so."""
    found = [
        (path, name)
        for path in shards(root)
        for name in read_raw(path)[0]
        if name != "__metadata__" and name.endswith(suffixes or "")
    ]
    return rng.choice(found) if found else None


QUANTIZED = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale")
SCALES = (".scales", ".weight_scale")
CODES = (".qweight", ".weight_packed")


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a file after a change of its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def file_bytes(root: Path, rng: random.Random) -> Expect:
    """Cut, empty, extend, or overwrite the beginning of a weight file."""
    path = rng.choice(shards(root))
    size = path.stat().st_size
    match rng.randrange(6):
        case 0:
            os.truncate(path, rng.randrange(size))
        case 1:
            path.write_bytes(b"")
        case 2:
            path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))
        case 3:
            path.write_bytes(rng.randbytes(rng.randint(1, 16)) + path.read_bytes()[16:])
        case 4:
            path.write_bytes(rng.randbytes(rng.randint(1, 5000)))
        case _:
            os.truncate(path, 0)
            os.truncate(path, size)  # a download that reserved its space and never came
    return Expect((path.name,))


def header_text(root: Path, rng: random.Random) -> Expect:
    """Put something into the header's place that is no header."""
    path = rng.choice(shards(root))
    header, data = read_raw(path)
    raw = json.dumps(header).encode()
    wrong: list[tuple[bytes, int | None]] = [
        (b"[" * 50_000 + b"]" * 50_000, None),
        (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, None),
        (b"[]", None),
        (b"null", None),
        (raw[: len(raw) // 2], None),
        (raw.replace(b"dtype", b"dt\xffpe", 1), None),
        (b'{"\\ud800": 1}', None),
        (b'{"x": ' + b"9" * 10_000 + b"}", None),
        (raw, 2**63),
        (raw, 2**64 - 1),
        (raw, len(raw) + len(data) + 1),
        (raw, 0),
        (raw, rng.randrange(len(raw))),
        (raw[:-1] + b', "__metadata__": 7}', None),
        (json.dumps({**header, "__metadata__": {"format": 3}}).encode(), None),
        (raw[:-1] + b", " + json.dumps(dict([rng.choice(list(header.items()))])).encode()[1:], None),
    ]
    write_raw(path, wrong[(choice := rng.randrange(len(wrong)))][0], data, wrong[choice][1])
    return Expect((path.name,))


def header_entry(root: Path, rng: random.Random) -> Expect:
    """Let one entry of a header lie about dtype, shape or place."""
    path, name = pick(root, rng) or (Path(), "")
    header, data = read_raw(path)
    entry = header[name]
    begin, end = entry["data_offsets"]
    lies: list[dict[str, Any]] = [
        {"dtype": "F4"}, {"dtype": 7}, {"dtype": None}, {"dtype": "F64"}, {"dtype": ["F16"]},
        {"shape": [2**62, 2**62]}, {"shape": [0, 2**62]}, {"shape": [2**40, 0, 2**40]}, {"shape": [-1, -len(data)]},
        {"shape": [1e300]}, {"shape": [float("nan")]}, {"shape": "12"}, {"shape": [[1]]}, {"shape": [1] * 5000},
        {"shape": [True, *entry["shape"]]}, {"shape": [side + 1 for side in entry["shape"]]},
        {"data_offsets": [begin, end + 8]}, {"data_offsets": [begin + 8, end + 8]}, {"data_offsets": [end, begin]},
        {"data_offsets": [-8, end - begin - 8]}, {"data_offsets": [2**63, 2**63 + end - begin]},
        {"data_offsets": [begin]}, {"data_offsets": [float(begin), float(end)]}, {"data_offsets": None},
        {"data_offsets": [0, end - begin]} if begin else {"data_offsets": [8, end - begin + 8]},
    ]  # fmt: skip
    header[name] = rng.choice([{**entry, **rng.choice(lies)}] * 9 + [{}, 7, [entry]])
    write_raw(path, header, data)
    return Expect((name, path.name))


def data_flips(root: Path, rng: random.Random) -> Expect:
    """Flip bits of the weights: it can be noticed only sometimes."""
    path = rng.choice(shards(root))
    header, data = read_raw(path)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 10, 1000))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    write_raw(path, header, bytes(changed))
    return Expect((path.name, "model."), refused=False)


# Tensors.


def tensor_missing(root: Path, rng: random.Random) -> Expect:
    """Remove a tensor that a quantized layer needs."""
    path, name = pick(root, rng, *QUANTIZED) or (Path(), "")
    edit(path, lambda tensors: tensors.pop(name))
    return Expect((name.rpartition(".")[0],))


def tensor_extra(root: Path, rng: random.Random) -> Expect:
    """Add a tensor without a layer, a second one of a name, or a plain weight beside a quantized one."""
    path, name = pick(root, rng, *QUANTIZED) or (Path(), "")
    others = [shard for shard in shards(root) if shard != path]
    if others and rng.random() < 0.5:
        tensor = load_file(path)[name]
        edit(others[0], lambda tensors: tensors.update({name: tensor}))
        return Expect((name,))
    module, _, role = name.rpartition(".")
    new = rng.choice(
        (f"ghost.{role}", f"{module}.extra.{role}", f"{module}.weight", f"evil\n\x1b[2J.{role}", f"{'y' * 9999}.{role}")
    )
    edit(path, lambda tensors: tensors.update({new: torch.ones(8, 8)}))
    return Expect((new, new.rpartition(".")[0], module, "evil\\n\\x1b[2J", "y" * 99))


def tensor_form(root: Path, rng: random.Random) -> Expect:
    """Give a tensor of a quantized layer another dtype or shape, in a header that is right."""
    path, name = pick(root, rng, *QUANTIZED) or (Path(), "")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name]
        forms = (tensor[1:], tensor[:, :-1], tensor.flatten(), tensor[None], tensor[:0], tensor[:, :0])
        dtypes = (torch.int64, torch.uint8, torch.float64, torch.bool, torch.float8_e4m3fn)
        choice = rng.randrange(2)
        tensors[name] = rng.choice(forms) if choice else tensor.float().to(rng.choice(dtypes))

    edit(path, change)
    return Expect((name, name.rpartition(".")[0]))


def scale_values(root: Path, rng: random.Random) -> Expect:
    """Put NaN or an infinity among the scales, a negative number, which may be meant, or nothing but zeros."""
    path, name = pick(root, rng, *SCALES) or (Path(), "")
    value = rng.choice((math.nan, math.inf, -math.inf, -0.25, None, 0.0, 6e4))
    harmless = value in (0.0, 6e4, -0.25)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].flatten().clone()
        if value is None:
            flat.zero_()
        else:
            flat[rng.randrange(len(flat))] = value
        tensors[name] = flat.view(tensors[name].shape)

    edit(path, change)
    return Expect((name,), refused=not harmless)  # one group may be dead, or large


def code_values(root: Path, rng: random.Random) -> Expect:
    """Zero all codes of a layer, or take INT8 codes and zero-points out of −8 … 7."""
    found = pick(root, rng, *CODES)
    if found:
        path, name = found
        edit(path, lambda tensors: tensors[name].zero_())
        return Expect((name,))
    names = [n for n, t in load_file(shards(root)[0]).items() if t.dtype == torch.int8]
    name = rng.choice(names)
    edit(
        shards(root)[0],
        lambda t: t[name].view(-1).__setitem__(rng.randrange(t[name].numel()), rng.choice((-9, 8, 127))),
    )
    return Expect((name,))


def dense_values(root: Path, rng: random.Random) -> Expect:
    """Put a NaN into a tensor that is copied."""
    path, name = pick(root, rng, "norm.weight", "embed_tokens.weight", ".bias") or (Path(), "")
    edit(path, lambda tensors: tensors[name].view(-1).__setitem__(rng.randrange(tensors[name].numel()), math.nan))
    return Expect((name,))


def g_idx_values(root: Path, rng: random.Random) -> Expect:
    """Let g_idx name groups that do not exist, or some group once too often; or lie about weight_shape."""
    found = pick(root, rng, "g_idx", "weight_shape")
    if not found:
        return scale_values(root, rng)
    path, name = found

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].flatten().clone()
        wrong = (-1, 2**31 - 1, -(2**31), 1000) if name.endswith("g_idx") else (0, -256, 2**31 - 1, int(flat[0]) + 8)
        flat[rng.randrange(len(flat))] = rng.choice(wrong)
        if name.endswith("g_idx") and tensors[name].any() and rng.random() < 0.3:
            flat = tensors[name].flatten().clone()
            flat[0] = (flat[0] + 1) % (flat.max() + 1)
        tensors[name] = flat.view(tensors[name].shape)
        unfilled.append(name.endswith("weight_g_idx") and bool((flat == -1).any()))

    unfilled: list[bool] = []
    edit(path, change)
    return Expect((name,), refused=not unfilled[0])  # a -1 says that calibration did not come to this layer


# What tools write on purpose, and what they write otherwise than is read here.


def unfilled_tensors(root: Path, rng: random.Random) -> Expect:
    """Leave g_idx at -1 or 0 throughout, or all zero-points at 0, or take them away; negate the scales of groups."""
    for path in shards(root):
        how, fill = rng.randrange(4), rng.choice((-1, 0))

        def change(tensors: dict[str, torch.Tensor], how: int = how, fill: int = fill) -> None:
            for name in list(tensors):
                if how == 0 and name.endswith("g_idx"):
                    tensors[name] = torch.full_like(tensors[name], fill)
                elif how == 1 and name.endswith(("qzeros", "weight_zero_point")):
                    tensors[name] = torch.zeros_like(tensors[name])
                elif how == 2 and name.endswith(("qzeros", "weight_zero_point")):
                    del tensors[name]
                elif name.endswith(SCALES):
                    signs = torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(tensors[name].shape[0])])
                    tensors[name] = (tensors[name].float() * signs[:, None]).to(tensors[name].dtype)

        edit(path, change)
    return Expect(("model.", "index.json"), refused=False)


def unread_tensors(root: Path, rng: random.Random) -> Expect:
    """Add a tensor that is quantized in a way that is not read, or that does something to a quantized layer."""
    path, name = pick(root, rng, "qweight", "weight_scale") or (Path(), "")
    module = name.rpartition(".")[0]
    words = torch.ones(4, 8, 8, dtype=torch.int32)
    others = {
        f"{module}.channel_scale": torch.ones(8),
        f"{module}.lora_A": torch.ones(8, 8),
        f"{module}.input_scale": torch.ones(1),
        "model.extra.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        "model.extra.weight_scale_inv": torch.ones(1, 1),
        "model.layers.0.mlp.experts.gate_up_proj_blocks": words.to(torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_packed": words,
        "model.layers.0.mlp.experts.w13": words,
    }
    new = rng.choice(list(others))
    if (root / "model.safetensors.index.json").exists():
        index = json.loads((root / "model.safetensors.index.json").read_text())
        index["weight_map"][new] = path.name
        (root / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(path, lambda tensors: tensors.update({new: others[new]}))
    return Expect((new, new.rpartition(".")[0]))


MUTATIONS: tuple[Mutation, ...] = (
    *(file_bytes, header_text, header_entry, data_flips, tensor_missing, tensor_extra, tensor_form),
    *(scale_values, code_values, dense_values, g_idx_values, unfilled_tensors, unread_tensors),
)
