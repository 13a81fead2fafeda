"""Measure what parts of the decode GEMM for Hopper cost, by leaving each out: `profile_gemm.py [--sizes NxKxM ...]`.

A time is that of one quantization of the activations and one GEMM, as in `tune_gemm.py`, by the launch that
`kernels/gemm/tuned.py` says. `whole_us` is the kernel as it is; the others are compiled from its source with something
taken out, and their results are wrong. `quantization_us` is a chain of quantizations alone. Parts that run side by side
add up to more than the whole, and what waits for two of them gains little by losing one.
"""

import argparse
import importlib.util
import re
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from graph_timing import microseconds
from random_layers import Layers
from results import add_options, line, save
from tune_gemm import pairs

from convert_w4a8.kernels.activations import gpu as activations
from convert_w4a8.kernels.gemm import cluster_sums, hopper, hopper_kernel, hopper_lookups, workspace

SIZES = (
    "6144x4096x64",
    "6144x4096x32",
    "1536x2048x64",
    "4096x14336x8",
    "28672x4096x8",
    "12288x33792x8",
    "12288x33792x64",
)
COPY = r"\n +async_copy\.async_copy_global_to_shared\({}_ring\[FILL\].*"
WITHOUT: dict[str, tuple[tuple[str, str], ...]] = {
    "sums": (
        (r"@first mbarrier[^\"]*", "}}\n"),
        (r"barrier\.cluster\.wait\.acquire\.aligned; ", ""),
        (
            r"_SEND = gl\.constexpr\(\"\"\"[^\"]*\"\"\"",
            '_SEND = gl.constexpr("""st.shared.v4.f32 [$4], {$8, $9, $10, $11}; mov.b32 $0, 0;"""',
        ),
        (r"_RECEIVE = gl\.constexpr\(\"\"\"[^\"]*\"\"\"", '_RECEIVE = gl.constexpr("""mov.b32 $0, 0;"""'),
        (r"\n    elif SPLIT:\n", "\n    elif SPLIT:\n        last = part == 0\n    elif TERMS == 0:\n"),
    ),
    "lookups": ((r"\n        _LOOK_UP,\n", '\n        "mov.b32 $0, $2; mov.b32 $1, $2;",\n'),),
    "fences": ((r"\n    fence_async_shared\(\)\n", "\n"),),
    "token_copies": ((COPY.format("token"), ""),),
    "word_copies": ((COPY.format("words"), ""),),
    "groups": ((r"(\n    groups = .*\n)", r"\1    groups = gl.minimum(groups, M - M)\n"),),
}
"""What is taken out: expressions of the source, and what stands in their place. Without groups, nothing is copied."""


def kernels(directory: Path) -> dict[str, Any]:
    """Return the kernel as it is, and those without something. ValueError where the source has no such place."""
    parts = (cluster_sums, hopper_lookups, hopper_kernel)
    source = "\n".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in parts)
    for module in parts[:2]:  # in one module, to be changed
        source = re.sub(rf"from {module.__name__} import (\([^)]*\)|.*)\n", "", source)
    found = {"whole": hopper_kernel._gemm_kernel}  # noqa: SLF001
    for name, edits in WITHOUT.items():
        text = source
        for old, new in edits:
            text, count = re.subn(old, new, text)
            if count != 1:
                raise ValueError(f"without {name}: {count} places {old!r}")
        path = directory / f"without_{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[f"no_{name}"] = module._gemm_kernel  # noqa: SLF001
    return found


def profile(size: str, variants: dict[str, Any]) -> dict[str, Any]:
    """Return the times of one size."""
    n, k, m = map(int, size.split("x"))
    layers, x = Layers(n, k), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    launch = hopper.choose_launch(m, n, k, workspace.multiprocessors(torch.device("cuda", 0)))
    row: dict[str, Any] = {"n": n, "k": k, "m": m, "launch": str(launch)}
    row["quantization_us"] = microseconds([lambda: activations.quantize(x)[0]] * 16)
    for name, kernel in variants.items():
        hopper._gemm_kernel = kernel  # type: ignore[attr-defined]  # noqa: SLF001
        by = replace(launch, indexed=launch.indexed and name != "no_groups")  # the first indices are of no group then
        row[f"{name}_us"] = microseconds(pairs(layers, x, 1, partial(hopper.gemm_by, launch=by)), 12)
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="NxKxM (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("a Hopper GPU is needed")
    workspace.prepare(torch.device("cuda", 0))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="w4a8-profile-") as directory:
        variants = kernels(Path(directory))
        for size in args.sizes:
            rows.append(row := profile(size, variants))
            print(" ".join(f"{name} {value:.5g}" for name, value in row.items() if name != "launch"), flush=True)
            document = save(args, "What do the parts of the decode GEMM for Hopper cost?", rows)
    print(line(document))


if __name__ == "__main__":
    main()
