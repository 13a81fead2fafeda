"""How an output was trained, in words: for its config.json and its card."""

from collections.abc import Sequence
from typing import Any

from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.result import DistillResult
from convert_w4a8.text import markdown_code

_TRAINED = {
    Preset.TABLES: "FP8 tables, channel scales, norms and biases",
    Preset.WEIGHTS: "weights through their INT4 codes, FP8 tables, channel scales, norms and biases",
}
_OPTIONS = ("batch_tokens", "rate", "warmup", "every", "seed")
_IF_ANY = ("patience", "towards", "hidden_weight", "damping")
"""Options that are recorded; of these, where they are not 0, which does nothing."""


def record(
    options: DistillOptions,
    digest: str,
    result: DistillResult,
    *,
    gpus: int = 1,
    replicate: bool = False,
    embeddings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what config.json says of a training: what came of it, and the choices by which it can be repeated.

    embeddings: names of those that were trained.
    """
    found = {
        "preset": str(options.preset),
        "steps": result.best_step,
        "tokens": result.tokens,
        "held_out_kl": [round(result.before, 6), round(result.after, 6)],
        "data_sha256": digest,
        "planned_steps": options.steps,
    }
    found |= {name: getattr(options, name) for name in _OPTIONS}
    found |= {name: value for name in _IF_ANY if (value := getattr(options, name))}
    return (
        found
        | ({"springs": "curvature"} if options.springs_of_curvature else {})
        | ({"gpus": gpus, "replicate": replicate} if gpus > 1 else {})
        | ({"top_k": result.top_k} if result.top_k else {})
        | ({"embeddings": list(embeddings)} if embeddings else {})
    )


def times_of(result: DistillResult) -> str:
    """Return how many times the text of each domain was trained on, for people."""
    return ", ".join(f"{tag} {times:,.1f} times" for tag, times in result.times.items())


def section(options: DistillOptions, result: DistillResult) -> str:
    """Return what the card says of a training, in Markdown."""
    rows = [
        (
            "trained",
            _TRAINED[options.preset]
            + (", embeddings and lm_head" if options.embeddings else "")
            + ("; the INT4 codes are those that came in" if options.preset is Preset.TABLES else ""),
        ),
        ("tokens", f"{result.tokens:,}; the best of {options.steps} steps was {result.best_step}"),
        ("text", f"trained on {markdown_code(times_of(result))}"),
        ("steps", f"{options.batch_tokens:,} tokens each, rates × {options.rate:g}, seed {options.seed}"),
        ("springs", options.springs),
        (
            "KL of held-out samples, nats per token"
            + (f", of the {result.top_k:,} likeliest tokens and the rest" if result.top_k else ""),
            f"{result.before:.5f} before, {result.after:.5f} now ({result.change:+.5f} ± {result.change_error:.5f})",
        ),
    ]
    if options.hidden_weight:
        rows.insert(-1, ("hidden states", f"in the loss with weight {options.hidden_weight:g}"))
    rows += [
        (
            f"… {markdown_code(domain.tag)}, {domain.share:.0%} of the tokens",
            f"{domain.before:.5f} before, {domain.after:.5f} now",
        )
        for domain in result.domains
        if len(result.domains) > 1
    ]
    return "\n".join(
        [
            "## Distillation",
            "",
            "Trained by `w4a8 distill` to give the predictions of the model in 16 bits, in the kernel's arithmetic."
            " What is said above of codes, tables and errors is of the checkpoint before the training.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )
