"""The columns of the tables of docs/explanation/quality.md."""

from columns import Columns

PERPLEXITY: Columns = (
    ("scheme", "{scheme}"),
    ("activations", "{activations}"),
    ("SQNR dB", "{sqnr_db:.1f}"),
    ("perplexity", "{perplexity:.3f}"),
    ("Δ nats/token", "{nats_per_token:+.4f} ± {nats_standard_error:.4f}"),
    ("divergence", "{divergence:.5f}"),
    ("accuracy, of W4A16's", "{relative_accuracy:.2%}"),
    ("same next token", "{agreement:.2%}"),
)
VLLM_PERPLEXITY: Columns = (
    ("checkpoint", "{checkpoint}"),
    ("perplexity", "{perplexity:.4f}"),
    ("nats/token over W4A16", "{nats_per_token:+.4f} ± {nats_standard_error:.4f}"),
    ("next-token accuracy, of W4A16's", "{relative_accuracy:.2%}"),
)
DIVERGENCE: Columns = (
    ("weights", "{weights}"),
    ("form", "{kind}"),
    ("activations", "{activations}"),
    ("divergence from BF16", "{kl:.5f} ± {kl_standard_error:.5f}"),
    ("less the closest W4A16's", "{kl_difference:+.5f} ± {kl_difference_standard_error:.5f}"),
    ("perplexity", "{perplexity:.3f}"),
    ("same next token", "{agreement:.2%}"),
)
COLUMNS: dict[str, Columns] = {
    "perplexity-gptq": PERPLEXITY,
    "perplexity-gptq-fp8": PERPLEXITY,
    "perplexity-awq": PERPLEXITY,
    "perplexity-vllm-gptq": VLLM_PERPLEXITY,
    "perplexity-vllm-awq": VLLM_PERPLEXITY,
    "kl": DIVERGENCE,
    "kl-vllm": DIVERGENCE,
    "kl-w4a16": DIVERGENCE,
    "kl-w4a16-vllm": DIVERGENCE,
    "kl-gptq": DIVERGENCE,
    "kl-moe": DIVERGENCE,
    "kl-vllm-moe": DIVERGENCE,
    "kl-presets": (
        ("preset", "{weights}"),
        ("divergence from BF16", "{kl:.5f} ± {kl_standard_error:.5f}"),
        ("perplexity", "{perplexity:.3f}"),
        ("same next token", "{agreement:.2%}"),
    ),
    "masking": (
        ("repeated prompt", "{setting}"),
        ("method", "{method_shown}"),
        ("data", "{data}"),
        ("tokens that count", "{tokens_kept:,}"),
        ("divergence from BF16", "{kl:.5f} ± {kl_standard_error:.5f}"),
        ("less unmasked", "{less:+.5f} ± {less_standard_error:.5f}"),
        ("behind the prompt", "{behind:.5f} ± {behind_standard_error:.5f}"),
        ("less unmasked", "{behind_less:+.5f} ± {behind_less_standard_error:.5f}"),
        ("choices of text", "{seeds:d}"),
    ),
}
