"""The data of scripts/quality/masking_data.py: what is claimed of them, and what each way to use them keeps."""

import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from convert_w4a8.samples.sample import SampleSet, TokenKind
from convert_w4a8.samples.tokenizer import open_tokenizer

pytest.importorskip("transformers", reason="the extra `quantize` is not installed")
sys.path.append(str(ROOT / "scripts" / "quality"))
import masking_data as experiment


@pytest.fixture(scope="module", params=["tools", "sources"])
def data(
    shared: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Any, dict[str, SampleSet]]:
    """Write the data, and read each arm's."""
    model, work = shared / "models" / "llama-31m-bf16", tmp_path_factory.mktemp("work")
    experiment.write_data(
        model,
        work,
        [shared / "models" / "heldout_text.txt"],
        experiment.PROMPTS[request.param](),
        share=0.7,
        samples=4,
        seed=0,
    )
    tokenizer = open_tokenizer(model)
    return tokenizer, {arm.name: experiment.read_arm(arm, work, tokenizer) for arm in experiment.ARMS}


def test_the_prompt_is_as_much_as_is_said(data: tuple[Any, dict[str, SampleSet]]) -> None:
    """70 % of all tokens, the same in every trace."""
    samples = data[1]["unmasked"]
    of_user = int(samples.counts[TokenKind.USER].sum())
    assert 1 - of_user / samples.seen == pytest.approx(0.7, abs=0.005)
    prompts = {tuple(sample.tokens[sample.kinds == TokenKind.SYSTEM].tolist()) for sample in samples.samples}
    assert len(prompts) == 1


def test_masks_leave_the_clean_text(data: tuple[Any, dict[str, SampleSet]]) -> None:
    """By the template exactly it; by repetition also the prompt of the first trace, and the ends of turns."""
    tokenizer, arms = data
    for clean, template, repeated in zip(
        *(arms[name].samples for name in ("clean", "template", "repeated")), strict=True
    ):
        text = tokenizer.decode(clean.tokens)
        kept = tokenizer.decode(template.tokens[template.kept])
        assert kept.removeprefix("\n") == text  # one token may hold the end of a header and the first space
        if repeated is not arms["repeated"].samples[0]:
            kept = tokenizer.decode(repeated.tokens[repeated.kept])
            assert text[40:] in kept  # the first words may be those of an earlier one
            assert "outdoor clothing" not in kept
            assert "JSONDecodeError(" not in kept
    assert arms["repeated"].samples[0].kept.all()
    assert arms["unmasked"].kept == arms["unmasked"].seen
