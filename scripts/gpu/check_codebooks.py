"""Compare codebooks of a GPU with those of the reference: kernel by kernel, and the error of whole matrices.

    python scripts/gpu/check_codebooks.py

Prints one JSON object a line; needs a CUDA GPU and Triton, nothing else.
"""

import json
from typing import Any
from unittest.mock import patch

import torch

from convert_w4a8 import devices
from convert_w4a8.codebooks import FAST, FULL, Method, Tables, quantize_matrices, quantize_matrix
from convert_w4a8.encoding.tables import decode
from convert_w4a8.kernels.codebooks import gpu, reference

DEVICE = torch.device("cuda")
ROWS = 256


def say(**what: Any) -> None:
    """Print a line."""
    print(json.dumps(what), flush=True)


def check_kernels() -> None:
    """Say how often a kernel and the reference differ."""
    torch.manual_seed(0)
    values = torch.randn(ROWS, 128, device=DEVICE) * 40
    importance = torch.rand(4, 128, dtype=torch.float64, device=DEVICE)
    found, expected = (kernels.fit(values, importance, 8) for kernels in (gpu, reference))
    say(kernel="fit", largest_difference=float((found - expected).abs().max()))
    tables, codes = [], []
    for kernels in (gpu, reference):
        entries, code = expected.clone(), torch.zeros(ROWS, 128, dtype=torch.uint8, device=DEVICE)
        kernels.refine(values, importance, entries, code, 1)
        tables.append(entries)
        codes.append(code)
    say(kernel="refine", entries_differ=differ(*tables), codes_differ=differ(*codes))
    factor = (torch.randn(128, 128, device=DEVICE).double() * 0.05).triu(1) + torch.eye(128, device=DEVICE)
    errors = []
    for kernels, code in zip((gpu, reference), codes, strict=True):
        error = torch.empty_like(values)
        kernels.feedback(values, values, factor[None], tables[1], code, error)
        errors.append(error)
    say(kernel="feedback", codes_differ=differ(*codes), errors_differ=differ(*errors))
    a = torch.randn(128, 256, device=DEVICE).double()
    moment = a @ a.t() / 256
    gradient = errors[1] @ moment.float()
    results = []
    for kernels in (gpu, reference):
        entries, code, error = tables[1].clone(), codes[1].clone(), errors[1].clone()
        kernels.descend(values, gradient, moment[None], entries, code, error, 2, True)
        results.append((entries, code, error))
    for name, one, other in zip(("entries", "codes", "errors"), *results, strict=True):
        say(kernel="descend", what=name, differ=differ(one, other))


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return which part of two tensors differs."""
    return float((a != b).double().mean())


def check_matrices() -> None:
    """Say what error a matrix has from the kernels and from the reference, and whether it is the same twice."""
    torch.manual_seed(0)
    n, k = 512, 512
    weight = torch.randn(n, k, device=DEVICE) / k**0.5
    sizes = torch.randn(k, device=DEVICE).exp()
    inputs = torch.randn(2048, k, device=DEVICE) @ torch.randn(k, k, device=DEVICE) * sizes
    moment = inputs.t() @ inputs / len(inputs)
    for name, method in {"full": FULL, "fast": FAST, "full, scale": Method(Tables.SCALE)}.items():
        layer, stats = quantize_matrix(weight, moment, method)
        again, _ = quantize_matrix(weight, moment, method)
        with patch.object(devices, "codebooks", lambda _: reference):
            _, expected = quantize_matrix(weight, moment, method)
        difference = (decode(layer) - weight).double()
        measured = float(((difference @ moment.double()) * difference).sum())
        say(
            matrix=name,
            noise=stats.noise,
            measured=measured,
            reference=expected.noise,
            same_twice=bool(torch.equal(layer.packed, again.packed) and torch.equal(decode(layer), decode(again))),
        )


def check_together() -> None:
    """Say what errors small matrices have that are worked together, against each alone; and whether twice the same."""
    torch.manual_seed(0)
    n, k, count = 256, 512, 8
    weights = [torch.randn(n, k, device=DEVICE) * 2.0**i for i in range(count)]
    inputs = [torch.randn(1024, k, device=DEVICE) * torch.randn(k, device=DEVICE).exp() for _ in weights]
    moments = [x.t() @ x / len(x) for x in inputs]
    for name, method in {"full": FULL, "fast": FAST}.items():
        found, again = (quantize_matrices(weights, moments, method, [None] * count) for _ in range(2))
        alone = [quantize_matrix(w, h, method)[1].noise for w, h in zip(weights, moments, strict=True)]
        measured = [
            float((((decode(layer) - w).double() @ h.double()) * (decode(layer) - w).double()).sum())
            for (layer, _), w, h in zip(found, weights, moments, strict=True)
        ]
        say(
            together=name,
            over_alone=[stats.noise / other for (_, stats), other in zip(found, alone, strict=True)],
            over_measured=[stats.noise / other for (_, stats), other in zip(found, measured, strict=True)],
            same_twice=all(
                torch.equal(a.packed, b.packed) and torch.equal(decode(a), decode(b))
                for (a, _), (b, _) in zip(found, again, strict=True)
            ),
        )


if __name__ == "__main__":
    check_kernels()
    check_matrices()
    check_together()
