"""What `w4a8 distill` prints for people."""

import shlex
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cli.render import verify_command
from convert_w4a8.distillation.mix import TrainingData, by_tag
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.prediction import Cost
from convert_w4a8.distillation.recipe import times_of
from convert_w4a8.distillation.result import DistillResult
from convert_w4a8.targets import find_target
from convert_w4a8.text import counted, human_bytes, human_seconds, printable, table


def plan_text(
    options: DistillOptions, data: TrainingData, cost: Cost, gpus: int = 1, *, replicate: bool = False
) -> str:
    """Render what is going to be done. gpus: that share every batch. replicate: each has the whole of both models."""
    plan = plan_dict(options, data, cost, gpus, replicate=replicate)
    tags = plan["domains"]
    names = ", ".join(printable(tag) for tag in tags[:6]) + (", …" if len(tags) > 6 else "")
    more = " with embeddings and lm_head" if options.embeddings else ""
    has = "the whole" if replicate else "a part"
    return (
        f"train      {options.preset}{more}: up to {options.steps:,} steps of {options.batch_tokens:,} tokens\n"
        f"springs    {options.springs}\n"
        + (f"shared     by {gpus} processes, each with {has} of both models\n" if gpus > 1 else "")
        + f"data       {counted(len(data.samples), 'sample')}, {plan['tokens']:,} tokens in"
        f" {counted(len(tags), 'domain')} ({names});"
        f" trained on {plan['times']:,.1f} times on average, padding counted\n"
        f"held out   {counted(len(data.held_out), 'sample')}, {plan['held_out_tokens']:,} tokens\n"
        f"predicted  {cost.trained:,} numbers are trained; {human_seconds(cost.seconds)} on"
        f" {'an H100' if gpus == 1 else f'{gpus} H100s'}, {human_bytes(cost.gpu_memory)} of"
        f" {'its' if gpus == 1 else 'the'} memory{'' if gpus == 1 else ' of each'}"
        + (f", {human_bytes(cost.logits)} of the teacher's logits on the disk" if cost.logits else "")
    )


def plan_dict(
    options: DistillOptions, data: TrainingData, cost: Cost, gpus: int = 1, *, replicate: bool = False
) -> dict[str, Any]:
    """Return what is going to be done for programs. gpus, replicate: as for `plan_text`."""
    tokens = sum(map(len, data.samples))
    return {
        "preset": str(options.preset),
        "steps": options.steps,
        "batch_tokens": options.batch_tokens,
        "damping": options.damping,
        "embeddings": options.embeddings,
        "gpus": gpus,
        "replicate": replicate,
        "domains": list(by_tag(data.samples)),
        "tokens": tokens,
        "times": options.steps * options.batch_tokens / tokens,
        "held_out_tokens": sum(map(len, data.held_out)),
        **cost.as_dict(),
    }


def result_text(result: DistillResult, start: str, out: Path) -> str:
    """Render a finished training; `start` is the checkpoint that was trained, as they named it."""
    rows = [
        (printable(domain.tag), f"{domain.share:.1%}", f"{domain.before:.5f}", f"{domain.after:.5f}")
        for domain in result.domains
    ]
    return "\n".join(
        [
            f"trained    {result.tokens:,} tokens in {human_seconds(result.seconds)}; the best step is"
            f" {result.best_step:,}",
            f"text       trained on {printable(times_of(result))}",
            f"KL         {result.before:.5f} → {result.after:.5f} nats per held-out token"
            f" ({result.change:+.5f} ± {result.change_error:.5f}, {result.change / result.before:+.0%})",
            table(rows, ("domain", "share of tokens", "KL before", "KL after")),
            f"verify     {verify_command(out, start)}",
            f"serve      {find_target(open_checkpoint(out)).serve_command(shlex.quote(str(out)))}",
        ]
    )
