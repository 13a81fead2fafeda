"""What transformers raises of a config.json that it cannot make a model of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import edit_json
from tiny_models import write_llama

from convert_w4a8.calibration.model import Model
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.model_classes import transformers_for
from convert_w4a8.conversion.memory import memory_errors
from convert_w4a8.errors import ConvertError


@pytest.mark.parametrize(
    "settings", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"pad_token_id": 300}, {"hidden_act": "nothing"}]
)
def test_settings_that_no_model_has(settings: dict[str, Any], tmp_path: Path) -> None:
    """One line, of whatever kind the error is."""
    model = write_llama(tmp_path / "in", layers=1)
    edit_json(model / "config.json", **settings)
    with pytest.raises(
        ConvertError, match=r"^config\.json: model_type 'llama': cannot be built by transformers"
    ) as caught:
        Model(open_checkpoint(model), torch.device("cpu"), torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_memory_that_is_full_is_no_fault_of_the_model(error: Exception, tmp_path: Path) -> None:
    """It goes on to who says so."""
    checkpoint = open_checkpoint(write_llama(tmp_path / "in", layers=1))
    with pytest.raises(type(error)), transformers_for(checkpoint, "--data", "another"):
        raise error
    with (
        pytest.raises(ConvertError, match=r"^the model: does not fit into the memory"),
        memory_errors("the model", of_gpu=True),
        transformers_for(checkpoint, "--data", "another"),
    ):
        raise error


def test_errors_with_a_line_of_their_own(tmp_path: Path) -> None:
    """They stay what they are."""
    checkpoint = open_checkpoint(write_llama(tmp_path / "in", layers=1))
    with (
        pytest.raises(ConvertError, match=r"^this: is so; do that$"),
        transformers_for(checkpoint, "--data", "another"),
    ):
        raise ConvertError("this", "is so", "do that")
