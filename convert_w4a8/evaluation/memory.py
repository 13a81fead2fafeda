"""What the memory arithmetic of `w4a8 report` predicts of a directory that is served."""

from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.errors import W4A8Error
from convert_w4a8.evaluation.servers import is_url
from convert_w4a8.report.memory import KV_BYTES, kv_cache


def predict(place: str) -> dict[str, Any] | None:
    """Return bytes of all tensors, and bytes that the KV cache takes for a token in BF16; None of a URL.

    What a configuration leaves open is None, with the reason.
    """
    if is_url(place):
        return None
    try:
        checkpoint = open_checkpoint(Path(place))
    except W4A8Error as error:
        return {"weight_bytes": None, "kv_bytes_per_token": None, "unknown": str(error)}
    cache = kv_cache(checkpoint.config)
    return {
        "weight_bytes": checkpoint.nbytes,
        "kv_bytes_per_token": None if cache.unknown else cache.per_token * KV_BYTES["BF16"],
        "unknown": cache.unknown,
    }
