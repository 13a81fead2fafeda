"""Compare our bytes and our arithmetic with vLLM's CUDA ops, on fresh random inputs: `check_ops.py [--quick]`.

Needs a Hopper GPU, vLLM, and this checkout on PYTHONPATH. Weights: `reorder` from all three packings against
`cutlass_encode_and_reorder_int4b` and its grouped form. Scales: `quantize_reference`, on the CPU and on the GPU,
against vLLM's load-time conversion, `expand_tables` against `cutlass_pack_scale_fp8`. Products: both GEMM ops, given
tables of random bytes of either sign, against `decode`, exactly (one-hot activations), and against `gemm`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from results import add_options
from stock_scales import quantize_scales

from convert_w4a8.encoding.lut_layout import reorder
from convert_w4a8.encoding.packing import pack_codes, unpack_codes
from convert_w4a8.encoding.tables import decode, expand_tables, multiply_tables
from convert_w4a8.fp8 import SCALE_MAX, quantize_tokens
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear
from convert_w4a8.quantization.baselines import quantize_reference

DEVICE = torch.device("cuda")
PACKINGS = (Packing.GPTQ, Packing.AWQ, Packing.PACK_QUANTIZED)
E4M3 = torch.float8_e4m3fn
SMALL = [(128, 256), (144, 256), (4112, 512), (1040, 768), (2064, 1280)]
ODD = [(128, 128), (256, 384), (144, 640)]
"""K % 256 != 0: vLLM takes these; CUTLASS's reordering is said to go out of bounds there. Hence last."""
LARGE = [(6144, 4096), (28672, 4096), (4096, 14336), (12288, 33792), (67584, 12288)]


@dataclass
class Row:
    """One comparison: what, of which size, how many of how many values agree, what it says beside that."""

    check: str
    size: str
    equal: int
    total: int
    note: str = ""
    demanded: bool = True

    @property
    def met(self) -> bool:
        """Whether everything that must agree does."""
        return not self.demanded or self.equal == self.total


def same(check: str, size: str, ours: torch.Tensor, theirs: torch.Tensor, *, demanded: bool = True) -> Row:
    """Compare two tensors of one shape value by value, FP8 by its bits."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Row(check, size, 0, theirs.numel(), f"{ours.dtype} {tuple(ours.shape)}, {tuple(theirs.shape)}")
    if ours.dtype is E4M3:
        ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
    return Row(check, size, int((ours == theirs).sum()), theirs.numel(), demanded=demanded)


def random_words(*shape: int) -> torch.Tensor:
    """Return int32 words of random nibbles."""
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, device=DEVICE).to(torch.int32)


def random_bytes(*shape: int) -> torch.Tensor:
    """Return random finite FP8 values of both signs."""
    low = torch.randint(0, 0x7F, shape, dtype=torch.uint8, device=DEVICE)
    return (low | (torch.randint(0, 2, shape, dtype=torch.uint8, device=DEVICE) << 7)).view(E4M3)


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements in the order of its memory, whatever its strides."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


def packed_like(packing: Packing, n: int, k: int) -> torch.Tensor:
    """Return random words of the shape that an [N, K] layer has in a packing."""
    shapes = {Packing.PACK_QUANTIZED: (n, k // 8), Packing.GPTQ: (k // 8, n), Packing.AWQ: (k, n // 8)}
    return random_words(*shapes[packing])


def signed_rows(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return two's-complement nibbles in rows, int32 [N, K/8], as vLLM has them before its op."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        convert_packed_uint4b8_to_signed_int4_inplace,
    )

    n, k = packing.shape_nk(packed.shape)
    rows = torch.empty(n, k // 8, dtype=torch.int32, device=DEVICE)
    step = 1024  # unpacked codes are large
    for first in range(0, n, step):
        part = slice(first, first + step)
        match packing:
            case Packing.PACK_QUANTIZED:
                rows[part] = packed[part]
            case Packing.GPTQ:
                rows[part] = pack_codes(unpack_codes(packed[:, part].contiguous(), packing))
            case Packing.AWQ:
                words = slice(first // 8, first // 8 + step // 8)
                rows[part] = pack_codes(unpack_codes(packed[:, words].contiguous(), packing))
    signed: torch.Tensor = convert_packed_uint4b8_to_signed_int4_inplace(rows)
    return signed


def check_weights(sizes: list[tuple[int, int]]) -> Iterator[Row]:
    """Reorder from every packing, against the dense op."""
    from vllm import _custom_ops as ops

    for n, k in sizes:
        for packing in PACKINGS:
            packed = packed_like(packing, n, k)
            theirs = memory(ops.cutlass_encode_and_reorder_int4b(signed_rows(packed, packing).t()))
            yield same(f"weights from {packing}", f"{n}x{k}", reorder(packed, packing).flatten(), theirs)


def check_grouped_weights(sizes: list[tuple[int, int]], experts: int = 3) -> Iterator[Row]:
    """Reorder expert by expert, against the grouped op; and the layout that it returns, against what is expected."""
    from vllm import _custom_ops as ops

    for n, k in sizes:
        packed = [packed_like(Packing.GPTQ, n, k) for _ in range(experts)]
        rows = torch.stack([signed_rows(expert, Packing.GPTQ) for expert in packed])
        theirs, layout = ops.cutlass_encode_and_reorder_int4b_grouped(rows)
        ours = torch.cat([reorder(expert, Packing.GPTQ).flatten() for expert in packed])
        yield same("grouped weights", f"{experts}x{n}x{k}", ours, memory(theirs))
        expected = torch.tensor([[n // 16, k // 32, 32 * n]] * experts, dtype=torch.int32, device=DEVICE)
        yield same("grouped layout", f"{experts}x{n}x{k}", expected, layout, demanded=False)


def random_scales(n: int, groups: int) -> torch.Tensor:
    """Return bfloat16 [N, G] like those of real layers, with some rows of edge cases."""
    scales = torch.exp(torch.randn(n, 1, device=DEVICE) * 0.5 - 5) * (1 + torch.rand(n, groups, device=DEVICE))
    edges = (0.0, 1e-8, 2**-9, 1 / 512, 448.0, 2**-130, 3e38)
    for row, edge in enumerate(edges):
        scales[row, 0] = edge
        scales[row + len(edges)] = edge
    return scales.bfloat16()


def check_scales(sizes: list[tuple[int, int]]) -> Iterator[Row]:
    """Quantize group scales, on the CPU and here, against vLLM's conversion with each of `QuantFP8`'s forms.

    The forms have two arithmetics: those that have the one of our CPU must agree; the others are reported.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, convert_bf16_scales_to_fp8

    with set_current_vllm_config(VllmConfig()):
        quant = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        forms: dict[str, tuple[str, Callable[..., Any]]] = {
            "native": ("reciprocal", quant.forward_native),
            "native, compiled": ("reciprocal", torch.compile(quant.forward_native, dynamic=True)),
            "CUDA kernel": ("division", quant.forward_cuda),
        }
        for n, k in sizes:
            size = f"{n}x{k}"
            scales = random_scales(n, k // GROUP_SIZE)
            group, channel = quantize_reference(scales.cpu().t())
            by_division = channel.equal(quantize_scales(scales.cpu(), "division")[1])
            ours = "division" if by_division else "reciprocal"
            group, channel = group.to(DEVICE), channel.to(DEVICE)
            here, channel_here = quantize_reference(scales.t())
            yield same("group scales, CPU and GPU", size, group, here)
            yield same("channel scales, CPU and GPU", size, channel, channel_here)
            for form, (arithmetic, function) in forms.items():
                demanded = arithmetic == ours
                try:
                    theirs, their_channel = convert_bf16_scales_to_fp8(function, scales.clone())
                except Exception as error:  # noqa: BLE001 (a form that cannot run here is a finding, not the end)
                    yield Row(f"scales, {form}", size, 0, 1, repr(error)[:60], demanded=demanded)
                    continue
                yield same(f"group scales, {form}", size, group.t(), theirs, demanded=demanded)
                yield same(f"channel scales, {form}", size, channel, their_channel.flatten(), demanded=demanded)


def check_tables(sizes: list[tuple[int, int]]) -> Iterator[Row]:
    """Expand group scales to tables, against the op: every byte there is, then real sizes."""
    from vllm import _custom_ops as ops

    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    finite = every[(every & 0x7F) != 0x7F].view(E4M3)[None]
    nan = every[(every & 0x7F) == 0x7F].view(E4M3)[None]
    yield same(
        "tables", "all finite bytes", expand_tables(finite).flatten(), ops.cutlass_pack_scale_fp8(finite).flatten()
    )
    usable = finite[finite.float().abs() <= SCALE_MAX][None]
    theirs = ops.cutlass_pack_scale_fp8(usable).flatten()
    yield same("tables, multiplied", "all bytes up to 56", multiply_tables(usable).flatten(), theirs)
    theirs = ops.cutlass_pack_scale_fp8(nan).flatten()
    yield same("tables", "NaN bytes", expand_tables(nan).flatten(), theirs, demanded=False)
    for n, k in sizes:
        scale = random_bytes(k // GROUP_SIZE, n)
        yield same("tables", f"{n}x{k}", expand_tables(scale).flatten(), ops.cutlass_pack_scale_fp8(scale).flatten())
        scale = torch.where(scale.float().abs() <= SCALE_MAX, scale.view(torch.uint8), 0).view(E4M3)
        theirs = ops.cutlass_pack_scale_fp8(scale).flatten()
        yield same("tables, multiplied", f"{n}x{k}", multiply_tables(scale).flatten(), theirs)


def random_layer(n: int, k: int) -> tuple[W4A8Linear, torch.Tensor]:
    """Return a layer with a table of random bytes per group and channel, and its LUT buffer."""
    packed = packed_like(Packing.PACK_QUANTIZED, n, k)
    channel = torch.rand(n, device=DEVICE) + 0.5
    layer = W4A8Linear(packed, Packing.PACK_QUANTIZED, None, random_bytes(k // GROUP_SIZE, n, 8), channel)
    return layer, reorder(packed, Packing.PACK_QUANTIZED)


def dense(tokens: torch.Tensor, token_scale: torch.Tensor, layer: W4A8Linear, buffer: torch.Tensor) -> torch.Tensor:
    """Call the dense op as the plugin does."""
    from vllm import _custom_ops as ops

    assert layer.entries is not None
    out: torch.Tensor = ops.cutlass_w4a8_mm(
        a=tokens,
        b_q=buffer.view(tokens.shape[1] // 8, -1),
        b_group_scales=layer.entries.flatten(),
        b_group_size=GROUP_SIZE,
        a_token_scales=token_scale,
        b_channel_scales=layer.channel_scale,
    )
    return out


def grouped(
    tokens: torch.Tensor, token_scale: torch.Tensor, counts: list[int], experts: list[tuple[W4A8Linear, torch.Tensor]]
) -> torch.Tensor:
    """Call the grouped op as vLLM's experts do: `counts[e]` consecutive tokens go to expert e."""
    from vllm import _custom_ops as ops

    k, n, number = tokens.shape[1], experts[0][1].shape[1] // 4, len(experts)
    buffers = torch.stack([buffer.view(n, k // 8) for _, buffer in experts])
    tables = torch.cat([layer.entries.flatten() for layer, _ in experts if layer.entries is not None])
    channels = torch.stack([layer.channel_scale for layer, _ in experts])
    _, layouts = ops.cutlass_encode_and_reorder_int4b_grouped(torch.zeros_like(buffers))

    def per_expert(size: int) -> torch.Tensor:
        return torch.full((number,), size, dtype=torch.int64, device=DEVICE)

    scale_strides = torch.zeros(number, 2, dtype=torch.int64, device=DEVICE)
    scale_strides[:, 0] = n
    offsets = torch.tensor([sum(counts[:e]) for e in range(number)], dtype=torch.int64, device=DEVICE)
    problems = torch.tensor([[n, count, k] for count in counts], dtype=torch.int32, device=DEVICE)
    out = torch.empty(len(tokens), n, dtype=torch.bfloat16, device=DEVICE)
    ops.cutlass_w4a8_moe_mm(
        out,
        tokens,
        buffers,
        token_scale,
        channels,
        tables,
        GROUP_SIZE,
        offsets,
        problems,
        per_expert(k),
        layouts,
        per_expert(n),
        scale_strides,
    )
    return out


def check_products(sizes: list[tuple[int, int]]) -> Iterator[Row]:
    """Both GEMM ops with arbitrary tables: every weight by one-hot tokens, exactly; then real activations."""
    for n, k in sizes:
        experts = [random_layer(n, k) for _ in range(2)]
        one_hot = torch.eye(k, device=DEVICE).to(E4M3)
        ones = torch.ones(k, 1, device=DEVICE)
        weights = [decode(layer) for layer, _ in experts]
        # One product with 1.0 and zeros: nothing rounds but the output.
        exact = [(ones * weight.t()).bfloat16() for weight in weights]
        size = f"{n}x{k}"
        yield same("dense op, every weight", size, dense(one_hot, ones, *experts[0]), exact[0])
        both = grouped(torch.cat([one_hot] * 2), torch.cat([ones] * 2), [k, k], experts)
        yield same("grouped op, every weight", size, both, torch.cat(exact))
        for m in (1, 17, 33, 256):
            act = torch.randn(m, k, device=DEVICE).bfloat16()
            tokens, token_scale = quantize_tokens(act)
            exact_product = token_scale * (tokens.float().double() @ weights[0].double().t())
            yield gap("dense op", f"M {m}, {size}", dense(tokens, token_scale, *experts[0]), exact_product)
            several = [(tokens.float().double() @ weight.double().t()) * token_scale for weight in weights]
            out = grouped(torch.cat([tokens] * 2), torch.cat([token_scale] * 2), [m, m], experts)
            yield gap("grouped op", f"M {m}, {size}", out, torch.cat(several))


def gap(check: str, size: str, ours: torch.Tensor, exact: torch.Tensor) -> Row:
    """Compare a bfloat16 product with the exact one: the norm of the error must be that of bfloat16's rounding."""
    error = float((ours.double() - exact).norm() / exact.norm())
    return Row(check, size, int(error < 0.003), 1, f"relative error {error:.5f}")


def main() -> int:
    """Run the checks, print the table, return 1 if something that must agree does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    add_options(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    large = [] if args.quick else LARGE
    checks: list[tuple[str, Callable[..., Iterator[Row]], list[tuple[int, int]]]] = [
        ("weights", check_weights, [*SMALL, *large]),
        ("grouped weights", check_grouped_weights, [(512, 256), (1536, 2048), *large[1:3]]),
        ("scales", check_scales, [(128, 256), (4112, 512), *large]),
        ("tables", check_tables, [(144, 256), *large]),
        ("products", check_products, [(256, 256), (512, 1024), *([] if args.quick else [(4096, 4096)])]),
        ("weights, odd K", check_weights, ODD),
    ]
    rows: list[Row] = []
    for name, check, sizes in checks:
        start = time.perf_counter()
        try:
            for row in check(sizes):
                rows.append(row)
                if not row.met:
                    print("MISMATCH", row, flush=True)
        except Exception as error:  # noqa: BLE001 (one check that cannot run must not hide the others)
            rows.append(Row(name, "", 0, 1, repr(error)[:200]))
            print(f"{name}: {error!r}", flush=True)
        torch.cuda.synchronize()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    met = all(row.met for row in rows)
    text = vllm_engine.table(
        ("check", "size (N x K)", "equal", "of", "", "note"),
        [
            (
                row.check,
                row.size,
                row.equal,
                row.total,
                "ok" if row.met and row.demanded else "" if row.met else "NO",
                row.note,
            )
            for row in rows
        ],
    )
    text += f"\nseed {args.seed}: {'all as demanded' if met else 'MISMATCHES'}"
    question = "Are our bytes and our arithmetic those of vLLM's CUDA ops?"
    vllm_engine.finish(args, question, [vars(row) for row in rows], text, seed=args.seed, met=met)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
