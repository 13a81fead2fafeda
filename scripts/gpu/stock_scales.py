"""How vLLM quantizes a stock checkpoint's scales at load, and in which of its two ways a LUT checkpoint has them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any


def quantize_scales(scales: Any, arithmetic: str) -> tuple[Any, Any]:
    """Quantize BF16 group scales [N, G], on the CPU, as one of the two forms of vLLM's `QuantFP8` does at load.

    arithmetic: "division", c = amax / 448, the CUDA kernel (eager mode); or "reciprocal", c = amax · fl(1/448), the
        native form (vLLM's default; on a GPU, PyTorch and inductor multiply where a tensor is divided by a number).
    Returns float8_e4m3fn [N, G] and float32 [N].
    """
    import torch

    s = scales.float()
    largest = s.abs().amax(dim=1)
    c = largest / 448 if arithmetic == "division" else largest * (torch.tensor(1.0) / 448)
    c = c.clamp(min=1 / (448 * 512))
    fp8 = (s / c[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (fp8.float() / 8).to(torch.float8_e4m3fn), c * 8


def scale_pairs(lut: Path, stock: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yield of each layer in both checkpoints the stock scales [N, G], our group scales [G, N] and channel scales."""
    from safetensors import safe_open

    with ExitStack() as stack:

        def tensors(directory: Path) -> dict[str, Any]:
            files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(directory.glob("*.safetensors"))]
            return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

        ours, theirs = tensors(lut), tensors(stock)
        for name, file in ours.items():
            module, _, leaf = name.rpartition(".")
            scale = f"{module}.weight_scale"
            if leaf == "weight_chan_scale" and scale in theirs and scale in ours:
                yield theirs[scale].get_tensor(scale), ours[scale].get_tensor(scale), file.get_tensor(name)


def find_arithmetics(lut: Path, stock: Path) -> set[str]:
    """Return with which arithmetics vLLM makes the checkpoint's scales, all of them, from the stock checkpoint's."""
    found, layers = {"division", "reciprocal"}, 0
    for scales, group, channel in scale_pairs(lut, stock):
        layers += 1
        for arithmetic in tuple(found):
            fp8, expected = quantize_scales(scales, arithmetic)
            if not (expected.equal(channel) and fp8.float().equal(group.t().float())):
                found.remove(arithmetic)
    return found if layers else set()
