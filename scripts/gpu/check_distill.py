"""Check and measure distillation on a GPU: `check_distill.py op|resume|passes|block|gpus|curves ...`.

    op OUT_W4A8              every layer of a checkpoint, as the student computes it, against vLLM's `cutlass_w4a8_mm`
    resume OUT_W4A8 --teacher MODEL --data FILE...
                             a training that is stopped half-way and continued, against a whole one
    passes OUT_W4A8 --teacher MODEL --data FILE...
                             tokens a second, and whether CUDA graphs compute what single launches do
    block                    memory and time of a step for each block of Llama 8B's shape
    gpus                     memory and time of a step of a few such blocks on one GPU and spread over several, and
                             what is predicted
    curves OUT_W4A8 --teacher MODEL --data FILE... --held-out FILE...
                             a training on one GPU and on several: the same divergences but for rounding

Products may differ by BF16's last bit, and by 2⁻¹³ of the sum of their terms' magnitudes for each of the tensor core's
sums: it adds FP8 products in about 14 bits. Memory and time of a block are those of a model of three blocks less those
of one of one block, halved.
"""

import argparse
import gc
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parent))
from results import PACKAGES, add_options, line, save

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.distillation import graphs
from convert_w4a8.distillation.data import Batch
from convert_w4a8.distillation.fused import fuse
from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import by_tag, mixed, training_data
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.prediction import predict_cost
from convert_w4a8.distillation.processes import Place, run_on_all
from convert_w4a8.distillation.run import distill
from convert_w4a8.distillation.sharded import ShardedTrainer, shard, shard_student
from convert_w4a8.distillation.student import Student, load_student, load_teacher
from convert_w4a8.distillation.teacher import LiveTeacher
from convert_w4a8.distillation.train import Trainer
from convert_w4a8.encoding.lut_layout import reorder
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.encoding.tables import decode
from convert_w4a8.errors import ConvertError
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.tokenizer import open_tokenizer
from convert_w4a8.targets import find_target

DEVICE = torch.device("cuda")
Row = dict[str, Any]
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SUMS = 2.0**-10
"""As in check_gemm.py: what sums in the tensor core may change, relative to the sum of the terms' magnitudes."""


def check_op(args: argparse.Namespace) -> Iterator[Row]:
    """Compare each layer with vLLM's operator."""
    from check_ops import dense

    checkpoint = open_checkpoint(args.start)
    target = find_target(checkpoint)
    torch.manual_seed(0)
    for name in target.find_layers(checkpoint):
        cpu = target.decode(checkpoint, name, read_tensor)
        assert isinstance(cpu, W4A8Linear)
        assert cpu.entries is not None
        w = W4A8Linear(cpu.packed.cuda(), cpu.packing, None, cpu.entries.cuda(), cpu.channel_scale.cuda())
        layer = LutLinear(w, None, Preset.TABLES).to(DEVICE)
        buffer = reorder(w.packed, w.packing)
        weights = decode(w)
        for m in (1, 17, 64, 300):
            act = (torch.randn(m, w.shape_nk[1], device=DEVICE) * torch.randn(m, 1, device=DEVICE).exp()).bfloat16()
            with torch.no_grad():
                ours = layer(act).float()
            theirs = dense(*quantize_tokens(act), w, buffer).float()
            gap = (ours - theirs).abs()
            step = torch.exp2(torch.floor(torch.log2(theirs.abs().clamp(min=2.0**-120))) - 7)
            allowed = step + SUMS * (act.float().abs() @ weights.abs().t())
            yield {
                "layer": name,
                "m": m,
                "wrong": int((gap > allowed).sum()),
                "same": float((gap == 0).float().mean()),
                "error": float(gap.norm() / theirs.norm()),
            }


def digest(trainer: Trainer) -> str:
    """Return a SHA-256 of all that a training has changed."""
    found = hashlib.sha256()
    for name, tensor in trainer.state().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def check_resume(args: argparse.Namespace) -> Iterator[Row]:
    """Train whole, again, and stopped half-way and continued in a new trainer: the same values and moments."""
    start, source = open_checkpoint(args.start), open_checkpoint(args.teacher)
    samples = read_samples(args.data, open_tokenizer(source.root), max_tokens=200_000, max_length=512).samples
    teacher = LiveTeacher(load_teacher(source, DEVICE))
    shares = dict.fromkeys(by_tag(samples), 1.0)
    for preset in Preset:
        options = DistillOptions(preset=preset, steps=args.steps, batch_tokens=4096)
        batch = mixed(samples, shares, options)

        def train(trainer: Trainer, steps: int) -> Trainer:
            while trainer.step < steps:
                trainer.train(batch(trainer.step))  # noqa: B023
            return trainer

        def new() -> Trainer:
            return Trainer(load_student(start, source, preset, DEVICE), teacher, options, DEVICE)  # noqa: B023

        with deterministic(DEVICE):
            whole, again = (digest(train(new(), args.steps)) for _ in range(2))
            stopped = train(new(), args.steps // 2)
            continued = new()
            continued.restore(stopped.state(), stopped.step)
            resumed = digest(train(continued, args.steps))
        yield {
            "preset": str(preset),
            "steps": args.steps,
            "trained": whole != digest(new()),
            "same_again": whole == again,
            "same_resumed": whole == resumed,
        }


def check_passes(args: argparse.Namespace) -> Iterator[Row]:
    """Train with and without CUDA graphs: the same values, and how fast."""
    start, source = open_checkpoint(args.start), open_checkpoint(args.teacher)
    samples = read_samples(args.data, open_tokenizer(source.root), max_tokens=500_000, max_length=512).samples
    teacher = LiveTeacher(load_teacher(source, DEVICE))
    shares = dict.fromkeys(by_tag(samples), 1.0)
    for preset in Preset:
        options = DistillOptions(preset=preset, steps=args.steps, batch_tokens=args.tokens)
        batch = mixed(samples, shares, options)
        row: Row = {"preset": str(preset), "batch_tokens": args.tokens}
        digests = []
        with deterministic(DEVICE):
            for name, most in (("graphs", graphs.MOST_WEIGHTS), ("launches", 0)):
                with patch.object(graphs, "MOST_WEIGHTS", most):
                    trainer = Trainer(load_student(start, source, preset, DEVICE), teacher, options, DEVICE)
                for step in range(args.steps):
                    if step == args.steps // 2:
                        began = time.perf_counter()
                    trainer.train(batch(step))
                seconds = (time.perf_counter() - began) / (args.steps - args.steps // 2)
                row |= {f"tokens_per_second_with_{name}": round(args.tokens / seconds)}
                digests.append(digest(trainer))
        yield row | {"same_again": digests[0] == digests[1]}


def random_linear(n: int, k: int) -> W4A8Linear:
    """Return a random layer on the GPU."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
    entries = torch.randn(k // GROUP_SIZE, n, 8, device=DEVICE).mul_(30).clamp_(-448, 448).to(torch.float8_e4m3fn)
    channel = torch.full((n,), 1e-3 / k**0.5, device=DEVICE)
    return W4A8Linear(pack_codes(codes), Packing.PACK_QUANTIZED, None, entries, channel)


def random_student(blocks: int, preset: Preset, vocabulary: int) -> tuple[Student, torch.nn.Module]:
    """Return a random student and teacher of Llama 8B's shape, with few blocks and a small vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=blocks, tie_word_embeddings=True, **LLAMA_8B)
    with DEVICE:
        teacher = LlamaForCausalLM(config).bfloat16().requires_grad_(requires_grad=False)
        model = LlamaForCausalLM(config).bfloat16().requires_grad_(requires_grad=False)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layers[name] = LutLinear(random_linear(*module.weight.shape), None, preset).to(DEVICE)
            above, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(above), leaf, layers[name])
    others = {}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_()
            others[name] = parameter
    return Student(model, layers, others, {}), teacher


def measure(
    blocks: int, options: DistillOptions, length: int, vocabulary: int = 8192, place: Place | None = None
) -> tuple[float, int, int]:
    """Return seconds of a step, bytes that stay, and the most bytes of a step. place: of several processes."""
    torch.manual_seed(0)  # the same models and batch in all processes
    student, teacher = random_student(blocks, options.preset, vocabulary)
    if place is None:
        fuse(student.model, DEVICE)
        fuse(teacher, DEVICE)
        trainer = Trainer(student, LiveTeacher(teacher), options, DEVICE)
    else:
        shard(teacher, place)
        trainer = ShardedTrainer(shard_student(student, place), LiveTeacher(teacher), options, place)
    del student, teacher
    rows = options.batch_tokens // length
    ids = torch.randint(0, vocabulary, (rows, length))
    batch = Batch(ids, torch.ones(rows, length, dtype=torch.bool))
    trainer.train(batch)
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.train(batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), kept, torch.cuda.max_memory_allocated()


def measure_block(args: argparse.Namespace) -> Iterator[Row]:
    """Measure a block of each preset, with and without computing it twice."""
    for preset in Preset:
        for recompute in (True, False):
            options = DistillOptions(preset=preset, steps=100, batch_tokens=args.tokens, recompute=recompute)
            one, three = (measure(blocks, options, args.length) for blocks in (1, 3))
            yield {
                "preset": str(preset),
                "recompute": recompute,
                "tokens": args.tokens,
                "length": args.length,
                "seconds_per_block": (three[0] - one[0]) / 2,
                "bytes_kept_per_block": (three[1] - one[1]) // 2,
                "peak_bytes_per_block": (three[2] - one[2]) // 2,
                "peak_bytes_of_one": one[2],
            }


BLOCKS, VOCABULARY = 6, 32768
"""Of the models of `gpus`: with as many blocks as are too large for CUDA graphs."""


def measure_parts(place: Place, tokens: int, length: int, presets: Sequence[Preset]) -> None:
    """Measure in one of several processes; the first one tells of every way to train: options, seconds and bytes."""
    for preset in presets:
        for recompute in (True, False):
            options = DistillOptions(preset=preset, steps=100, batch_tokens=tokens, recompute=recompute)
            with deterministic(place.device):
                found = measure(BLOCKS, options, length, VOCABULARY, place if place.ranks > 1 else None)
            bytes_ = torch.tensor(found[1:], device=place.device)
            dist.all_reduce(bytes_, dist.ReduceOp.MAX)
            if place.is_first:
                place.tell((options, found[0], *bytes_.tolist()))
            gc.collect()  # FSDP2's hooks refer to what they are hooked to
            torch.cuda.empty_cache()


def measure_gpus(args: argparse.Namespace) -> Iterator[Row]:
    """Measure steps of the same batch on one GPU and on several, beside what is predicted."""
    from predict_distill import MODELS, sizes

    shape = MODELS["Llama 8B"] | {"blocks": BLOCKS, "vocabulary": VOCABULARY, "tied": True}
    for gpus in args.gpus:
        found: list[tuple[DistillOptions, float, int, int]] = []

        def hear(each: tuple[DistillOptions, float, int, int], found: list[Any] = found) -> None:
            found.append(each)
            print(each, flush=True)  # the others may not come

        run_on_all(measure_parts, (args.tokens, args.length, args.presets), gpus, DEVICE.type, hear)
        for options, seconds, kept, peak in found:
            size = sizes(**shape)
            each = replace(options, batch_tokens=args.tokens // gpus)
            teacher = 2 * (size.weights + size.fixed + size.others)
            cost = predict_cost(size, each, teacher_bytes=teacher, gpus=gpus)
            yield {
                "blocks": BLOCKS,
                "preset": str(options.preset),
                "recompute": options.recompute,
                "gpus": gpus,
                "tokens": args.tokens,
                "length": args.length,
                "seconds_per_step": seconds,
                "predicted_seconds": cost.seconds_per_step,
                "bytes_kept": kept,
                "peak_bytes": peak,
                "predicted_bytes": cost.gpu_memory,
            }


def check_curves(args: argparse.Namespace) -> Iterator[Row]:
    """Train on one GPU and on several, from the same samples in the same order."""
    start, source = open_checkpoint(args.start), open_checkpoint(args.teacher)
    tokens = source.number("vocab_size")
    samples, held_out = (
        read_samples(files, None, max_length=512, vocab_size=tokens).samples for files in (args.data, args.held_out)
    )
    data = training_data(samples, held_out, "uniform")
    for preset in args.presets:
        options = DistillOptions(preset=preset, steps=args.steps, batch_tokens=args.tokens, every=args.steps // 8)
        first: list[float] = []
        for gpus in args.gpus:
            losses: list[float] = []
            row: Row = {"preset": str(preset), "gpus": gpus, "steps": args.steps, "tokens": args.tokens}
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result = distill(
                        start,
                        source,
                        data,
                        Path(folder) / "out",
                        options,
                        device=DEVICE,
                        gpus=gpus,
                        progress=lambda _step, loss: losses.append(loss),  # noqa: B023
                    )
                except ConvertError as error:  # nothing is gained in so few steps
                    row |= {"error": str(error)}
                else:
                    curve = [point.held_out for point in result.curve]
                    row |= {"before": result.before, "after": result.after, "held_out": curve}
            first = first or losses
            yield row | {"seconds": time.perf_counter() - began, **described(losses, first), "losses": losses}


def described(losses: list[float], first: list[float]) -> Row:
    """Return the mean of the last quarter of a curve, and how far its steps are from those of another."""
    last = losses[-(len(losses) // 4) :]
    return {
        "training": sum(last) / len(last),
        "apart": statistics.mean(abs(ours - theirs) for ours, theirs in zip(losses, first, strict=True)),
        "apart_at_most": max(abs(ours - theirs) for ours, theirs in zip(losses, first, strict=True)),
    }


CHECKS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "op": check_op,
    "resume": check_resume,
    "passes": check_passes,
    "block": measure_block,
    "gpus": measure_gpus,
    "curves": check_curves,
}

QUESTIONS = {
    "gpus": "What does a step of a few blocks of Llama 8B cost on one GPU and spread over two?",
    "curves": "Does a training spread over two GPUs go as on one?",
}


def main() -> int:
    """Run one of the checks; return 1 if something that must agree does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(CHECKS))
    parser.add_argument("start", type=Path, nargs="?", metavar="OUT_W4A8")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--data", type=Path, nargs="*", default=[])
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step (block, passes, gpus, curves)")
    parser.add_argument("--length", type=int, default=2048, help="of a sample (block, gpus)")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2], help="how many (gpus, curves)")
    parser.add_argument("--presets", type=Preset, nargs="*", default=list(Preset), help="(gpus, curves)")
    add_options(parser)
    args = parser.parse_args()
    rows = []
    for row in CHECKS[args.what](args):
        rows.append(row)
        print(row, flush=True)
        document = save(
            args, QUESTIONS.get(args.what, "Does distillation compute as the kernel does?"), rows, packages=PACKAGES
        )
    print(line(document))
    wrong = [
        row for row in rows if row.get("wrong") or not row.get("same_again", True) or not row.get("same_resumed", True)
    ]
    print(f"{len(wrong)} of {len(rows)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
