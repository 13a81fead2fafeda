"""A plugin for vLLM that counts the tokens for which two ranks give experts other inputs, or choose other experts.

All ranks compute norms and routers for themselves, of the same numbers, and each adds its part of the experts that it
chose: where ranks choose otherwise, the sum has parts of experts that do not belong together. Counted are all tokens
that pass, in CUDA graphs too; `ask` has all ranks say what they have counted so far.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = "W4A8_RANK_AGREEMENT"
"""The environment variable with the folder of questions and answers."""
MORE = "rank_agreement:register"
"""The entry point."""
_counted: dict[str, Any] = {}
"""By layer, int64 [3]: tokens, those of other inputs, and those with other experts."""


def register() -> None:
    """Count in every call of a layer's experts."""
    threading.Thread(target=_answer, daemon=True).start()
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

    prepare = FusedMoEMethodBase.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        prepare(self, *args, **options)
        apply = self.apply

        def counting(layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *others: Any, **more: Any) -> Any:
            _count(layer.layer_name, x, topk_ids)
            return apply(layer, x, topk_weights, topk_ids, *others, **more)

        self.apply = counting

    FusedMoEMethodBase.__init__ = init


def _count(name: str, x: Any, topk_ids: Any) -> None:
    import torch
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    ranks = get_tensor_model_parallel_world_size()
    if name not in _counted:
        _counted[name] = torch.zeros(3, dtype=torch.int64, device=x.device)
    factors = torch.arange(1, 2 * x.shape[1], 2, dtype=torch.int64, device=x.device)
    seen = (x.view(torch.int16).to(torch.int64) * factors).sum(1)
    others = tensor_model_parallel_all_reduce(seen.clone()) != ranks * seen
    ids = topk_ids.to(torch.int64)
    # Squares: that ranks have the same sum, and differ, is then impossible of two.
    chosen = torch.stack((ids, ids * ids))
    differ = (tensor_model_parallel_all_reduce(chosen.clone()) != ranks * chosen).any(0).any(1)
    _counted[name] += torch.stack((torch.full_like(others.sum(), len(x)), others.sum(), differ.sum()))


def _answer() -> None:
    """Wait for a question in the folder, and answer it with a file for each process."""
    folder = Path(os.environ[FOLDER])
    while not (folder / "ask").exists():
        time.sleep(0.1)
    found = {name: counts.tolist() for name, counts in _counted.items()}
    part = folder / f"{os.getpid()}.part"
    part.write_text(json.dumps(found))
    part.rename(folder / f"{os.getpid()}.json")


def ask(folder: Path, ranks: int, patience: float = 20.0) -> list[dict[str, list[int]]]:
    """Return what so many ranks have counted, after the work; fewer where some do not answer."""
    (folder / "ask").touch()
    until = time.monotonic() + patience
    found: list[dict[str, list[int]]] = []
    while len(found) < ranks and time.monotonic() < until:
        time.sleep(0.2)
        answers = (json.loads(path.read_text()) for path in folder.glob("*.json"))
        found = [answer for answer in answers if answer]  # the process of the engine has no layers
    return found
