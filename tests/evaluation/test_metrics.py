"""What vLLM's `/metrics` say of room."""

import pytest

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


def test_counts_are_those_of_all_engines() -> None:
    """Without any, nothing is said."""
    counts = "".join(
        f'vllm:prefix_cache_{name}_total{{engine="{engine}"}} {number}\n'
        for name, number in (("queries", 100.0), ("hits", 30.0))
        for engine in (0, 1)
    )
    found = parse(counts + REST)
    assert (found.prefix_queries, found.prefix_hits, found.preemptions) == (200, 60, 2)
    assert parse(REST).prefix_queries is None
    assert parse("vllm:prefix_cache_hits_total NaN\n").prefix_hits is None


@pytest.mark.parametrize("number", ["NaN", "+Inf", "-Inf"])
def test_what_is_no_number_is_not_there(number: str) -> None:
    """A gauge that was never set."""
    room = parse(f'vllm:kv_cache_usage_perc{{engine="0"}} {number}\nvllm:num_preemptions_total {number}\n')
    assert (room.usage, room.preemptions) == (None, None)
    assert "vllm:kv_cache_usage_perc is not in /metrics" in room.missing
