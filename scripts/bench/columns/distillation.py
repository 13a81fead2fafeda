"""The columns of the tables of docs/explanation/distillation.md."""

from columns import Columns

COLUMNS: dict[str, Columns] = {
    "distill-rates": (
        *(("preset", "{preset}"), ("entries", "{entries:g}"), ("scales", "{scale:g}"), ("norms", "{other:g}")),
        *(("weights", "{weight:g}"), ("towards the teacher", "{towards:g}"), ("training text", "{training:.5f}")),
        ("held-out text, change", "{change:+.5f} ± {change_standard_error:.5f}"),
    ),
    "distill-longer": (
        *(("preset", "{preset}"), ("changed", "{changed}"), ("entries", "{entries:.2g}"), ("weights", "{weight:.2g}")),
        *(("library", "{library:.5f}"), ("packages", "{packages:.5f}")),
        *(("evaluation text", "{evaluation:.5f}"), ("averaged", "{averaged:.5f}")),
    ),
    "distill-rounding": (
        *(("preset", "{preset}"), ("entries are rounded to E4M3", "{rounding}"), ("tokens", "{tokens:,}")),
        *(("evaluation text before rounding", "{real_evaluation:.5f}"), ("library", "{library:.5f}")),
        *(("packages", "{packages:.5f}"), ("evaluation text", "{evaluation:.5f}")),
    ),
    "distill-step": (
        *(("preset", "{preset}"), ("norms, gates and rotations", "{blocks}"), ("kernels", "{launches:,}")),
        *(
            ("ms: products", "{products:.1f}"),
            ("attention", "{attention:.1f}"),
            ("kernels of this project", "{ours:.1f}"),
        ),
        *(("others", "{others:.1f}"), ("all", "{all:.1f}")),
    ),
    "distill-kl": (
        *(("checkpoint", "{weights}"), ("activations", "{activations}"), ("tokens trained on", "{tokens:,}")),
        *(("GPUs", "{gpus}"), ("s", "{seconds:.0f}")),
        ("divergence from BF16", "{kl:.5f} ± {kl_standard_error:.5f}"),
        *(("perplexity", "{perplexity:.3f}"), ("same next token", "{agreement:.2%}")),
    ),
    "distill-springs": (
        *(("preset", "{preset}"), ("changed", "{changed}"), ("tokens", "{tokens:,}")),
        *(("library", "{library:.5f}"), ("wide", "{wide:.5f}"), ("evaluation text", "{evaluation:.5f}")),
    ),
    "distill-curvature": (
        *(("springs", "{springs}"), ("library, half-way", "{half_library:.5f}"), ("wide", "{half_wide:.5f}")),
        *(("library, at 90 %", "{library:.5f}"), ("wide, at 90 %", "{wide:.5f}")),
    ),
    "distill-damping": (
        *(("damping", "{damping:g}"), ("rate", "{rate:g}"), ("tokens", "{tokens:,}"), ("s", "{seconds:.0f}")),
        *(("library", "{library:.5f}"), ("wide", "{wide:.5f}"), ("evaluation text", "{evaluation:.5f}")),
    ),
    "distill-text": (
        ("trained", "{trained}"),
        *(
            ("library", "{library_share:.0%}, {library_times:.1f} times"),
            ("packages", "{packages_share:.0%}, {packages_times:.1f}"),
        ),
        ("written by the teacher", "{own_share:.0%}, {own_times:.1f}"),
        *(("tokens", "{tokens:,}"), ("s", "{seconds:.0f}")),
        *(("library, held out", "{library:.5f}"), ("packages, held out", "{wide:.5f}")),
        ("evaluation text", "{evaluation:.5f} ({change:+.1%})"),
    ),
    "distill-repeats": (
        *(("preset", "{preset}"), ("text", "{text}"), ("times trained on", "{times:.1f}")),
        ("what was trained on", "{trained_before:.5f} → {trained_after:.5f} ({trained_change:+.0%})"),
        ("other text of its kind", "{held_before:.5f} → {held_after:.5f} ({held_change:+.0%})"),
    ),
    "distill-gpus": (
        *(("preset", "{preset}"), ("blocks computed twice", "{recompute}"), ("GPUs", "{gpus}")),
        *(("s a step", "{seconds_per_step:.3f}"), ("predicted, H100", "{predicted_seconds:.3f}")),
        *(("bytes on each, kept", "{bytes_kept:,}"), ("at most", "{peak_bytes:,}")),
        ("predicted", "{predicted_bytes:,}"),
    ),
    "distill-kl-vllm": (
        *(("checkpoint", "{weights}"), ("divergence from BF16", "{kl:.5f} ± {kl_standard_error:.5f}")),
        ("perplexity", "{perplexity:.3f}"),
        ("nats a token more", "{nats_per_token:+.4f} ± {nats_standard_error:.4f}"),
        ("same next token", "{agreement:.2%}"),
    ),
    "distill-block": (
        *(("preset", "{preset}"), ("blocks computed twice", "{recompute}"), ("s a block", "{seconds_per_block:.3f}")),
        *(("bytes kept", "{bytes_kept_per_block:,}"), ("bytes at most", "{peak_bytes_per_block:,}")),
    ),
    "distill-curves": (
        *(("preset", "{preset}"), ("GPUs", "{gpus}"), ("steps", "{steps}"), ("last quarter", "{training:.5f}")),
        *(("s", "{seconds:.0f}"), ("a step apart, mean", "{apart:.6f}"), ("at most", "{apart_at_most:.6f}")),
        *(("held out, before", "{before:.5f}"), ("after", "{after:.5f}")),
    ),
    "distill-paper": (
        *(("model", "{model}"), ("preset", "{preset}"), ("GPUs", "{gpus}"), ("teacher", "{teacher}")),
        *(("tokens of a step on each", "{tokens_a_gpu:,}"), ("GiB on each", "{gib:.0f}")),
        *(("s a step", "{seconds_per_step:.1f}"), ("h for 50 million tokens", "{hours:.1f}")),
    ),
    "distill-mix": (
        *(("preset", "{preset}"), ("domain", "{domain}"), ("before", "{before:.5f}")),
        *(("share by drop", "{share:.0%}"), ("by drop", "{drop:.5f}"), ("uniform", "{uniform:.5f}")),
        ("by drop less before", "{change:+.5f} ± {change_standard_error:.5f}"),
        ("by drop less uniform", "{difference:+.5f} ± {difference_standard_error:.5f}"),
        ("seeds", "{seeds}"),
    ),
    "distill-stored": (
        *(("teacher", "{teacher}"), ("logits of a token", "{top_k}"), ("hidden states", "{hidden:g}")),
        *(("bytes a token", "{bytes_per_token:,.0f}"), ("s of the pass", "{pass_seconds:.0f}"), ("s", "{seconds:.0f}")),
        *(("divergence it sees before", "{bound:.5f}"), ("after, by all logits", "{after:.5f}")),
        ("more than the first", "{over_live:+.5f} ± {over_live_standard_error:.5f}"),
    ),
}
