"""What vLLM's `/metrics` say of room."""

from convert_w4a8.evaluation.metrics import parse

REST = "vllm:kv_cache_usage_perc 0.5\nvllm:num_preemptions_total 2.0\n"


def cache(engine: int, blocks: int, tokens: str) -> str:
    labels = f'block_size="16",engine="{engine}",kv_cache_size_tokens="{tokens}",num_gpu_blocks="{blocks}"'
    return f"vllm:cache_config_info{{{labels}}} 1.0\n"


def test_tokens_that_fit() -> None:
    """By vLLM's own count, of each engine; blocks are those of all engines in every line."""
    assert parse(cache(0, 1000, "16000") + REST).kv_tokens == 16000
    assert parse(cache(0, 2000, "12000") + cache(1, 2000, "12000") + REST).kv_tokens == 24000
    assert parse(cache(0, 2000, "None") + cache(1, 2000, "None") + REST).kv_tokens == 32000


def test_what_is_not_there_is_named() -> None:
    """Each by itself."""
    found = parse("vllm:num_preemptions_total 2.0\n")
    assert found.missing == ("vllm:cache_config_info is not in /metrics", "vllm:kv_cache_usage_perc is not in /metrics")
    assert (found.kv_tokens, found.usage, found.preemptions) == (None, None, 2)
    assert parse(cache(0, 1000, "16000") + REST).missing == ()
