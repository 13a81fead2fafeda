"""Samples from files: tokens, masks, counts and limits."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import TEMPLATES, with_template

from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.masks import parse_mask
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import REASONS, Sample, SampleSet, TokenKind, count
from convert_w4a8.samples.tokenizer import open_tokenizer


def write(path: Path, *rows: Any) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trace(number: int) -> dict[str, Any]:
    """Return an agent's trace; all begin with the same long prompt."""
    prompt = "You are a helper. " + " ".join(f"Rule {n}: never do thing number {n * 7}." for n in range(30))
    said = [(f"Question {number}: what is {number} + {n}?", f"It is {number + n}.") for n in range(3)]
    turns = [
        {"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": [{"role": "system", "content": prompt}, *turns]}


def text_of(tokenizer: Any, sample: Sample, *, kept: bool) -> str:
    """Return the text of the tokens that count, or of the others."""
    return str(tokenizer.decode(sample.tokens[sample.kept == kept]))


def test_counts_add_up(tokenizer: Any, tmp_path: Path) -> None:
    """Every token is of one kind, and kept or masked for one reason; JSON says the same."""
    path = write(tmp_path / "a.jsonl", *map(trace, range(4)), {"text": "def f(x):\n    return x"})
    found = read_samples([path], tokenizer, parse_mask("template,system,repeated"))
    tokens = np.concatenate([sample.tokens for sample in found.samples])
    kinds = np.concatenate([sample.kinds for sample in found.samples])
    masked_by = np.concatenate([sample.masked_by for sample in found.samples])
    assert found.seen == found.tokens == len(tokens)
    for kind in TokenKind:
        for reason in range(1 + len(REASONS)):
            assert found.counts[kind, reason] == ((kinds == kind) & (masked_by == reason)).sum()
    shown = found.as_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert sum(kind["seen"] for kind in shown["kinds"].values()) == found.seen
    assert (
        sum(kind["kept"] for kind in shown["kinds"].values()) == found.kept == sum(s.kept.sum() for s in found.samples)
    )
    assert shown["kinds"]["system"]["masked"] == {"system": shown["kinds"]["system"]["seen"]}
    assert shown["kinds"]["text"]["kept"] == shown["kinds"]["text"]["seen"]


def test_what_is_masked(tokenizer: Any, tmp_path: Path) -> None:
    """By kind the prompt and the headers; by repetition the prompt, but in the first sample."""
    path = write(tmp_path / "a.jsonl", *map(trace, range(4)))
    for sample in read_samples([path], tokenizer, parse_mask("template,system")).samples:
        assert text_of(tokenizer, sample, kept=True).startswith("Question")
        assert "Rule" not in text_of(tokenizer, sample, kept=True)
        assert "Question" not in text_of(tokenizer, sample, kept=False)
    first, *others = read_samples([path], tokenizer, parse_mask("repeated")).samples
    assert first.kept.all()
    for sample in others:
        assert "Rule" not in text_of(tokenizer, sample, kept=True)
        assert "what is" in text_of(tokenizer, sample, kept=True)
    first = read_samples([path], tokenizer, parse_mask("repeated:all")).samples[0]
    assert "Rule" not in text_of(tokenizer, first, kept=True)
    assert read_samples([path], tokenizer).samples[0].kept.all()


def test_tokens_are_those_of_the_model(tokenizer: Any, tmp_path: Path) -> None:
    """Of messages as `apply_chat_template` makes them, of text as the tokenizer does."""
    row = trace(0)
    path = write(tmp_path / "a.jsonl", row, {"text": "a = 1"}, {"input_ids": [5, 6, 7]})
    chat, text, ids = read_samples([path], tokenizer).samples
    ordinary = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)
    assert chat.tokens.tolist() == ordinary["input_ids"]
    assert text.tokens.tolist() == tokenizer("a = 1")["input_ids"]
    assert ids.tokens.tolist() == [5, 6, 7]
    assert [sample.tokens.dtype for sample in (chat, text, ids)] == [np.int32] * 3
    assert [sample.origin for sample in (chat, text, ids)] == [f"{path} line {n}" for n in (1, 2, 3)]
    assert set(ids.kinds.tolist()) == {TokenKind.TEXT}


def test_a_first_token_of_the_tokenizer_is_the_templates(tokenizer: Any, tmp_path: Path) -> None:
    """Such as <s>, which most tokenizers put before a text."""
    from tokenizers.processors import TemplateProcessing

    own = open_tokenizer(Path(tokenizer.name_or_path))
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    (sample,) = read_samples([write(tmp_path / "a.jsonl", {"text": "a = 1<|endoftext|>"})], own).samples
    assert sample.tokens[[0, -1]].tolist() == [0, 0]
    assert sample.kinds.tolist() == [TokenKind.TEMPLATE] + [TokenKind.TEXT] * (len(sample) - 1)


def test_a_loss_mask_is_obeyed(tokenizer: Any, tmp_path: Path) -> None:
    """llm-compressor's column: 1 counts. It comes first among the reasons, and its length is checked."""
    path = write(tmp_path / "a.jsonl", {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]})
    found = read_samples([path], tokenizer)
    assert found.samples[0].kept.tolist() == [False, True, True]
    assert found.as_dict()["kinds"]["text"] == {"seen": 3, "kept": 2, "masked": {"loss_mask": 1}}
    write(path, {"input_ids": [5], "loss_mask": [1]}, {"input_ids": [5, 6], "loss_mask": [1]})
    with pytest.raises(ConvertError, match="line 2: loss_mask has 1 entries for 2 tokens"):
        read_samples([path], tokenizer)


def test_limits(tokenizer: Any, tmp_path: Path) -> None:
    """Long samples lose their end, the last one what does not fit; the lines behind are not read."""
    rows = [{"input_ids": list(range(1, n))} for n in (11, 101, 11)]
    path = write(tmp_path / "a.jsonl", *rows, "not an object")
    found = read_samples([path], tokenizer, max_length=20, max_tokens=35)
    assert [len(sample) for sample in found.samples] == [10, 20, 5]
    assert found.cut == 2
    with pytest.raises(ConvertError, match="line 4: is a string"):
        read_samples([path], tokenizer, max_length=20)
    assert len(read_samples([write(path, rows[1])], tokenizer).samples[0]) == 100


@pytest.mark.parametrize(("ids", "wrong"), [([8192], "8,192"), ([3, -1], "-1"), ([10**30], f"{10**30:,}")])
def test_ids_outside_of_the_vocabulary(tokenizer: Any, tmp_path: Path, ids: list[int], wrong: str) -> None:
    """They would be read past the end of the embedding."""
    path = write(tmp_path / "a.jsonl", {"input_ids": [8191, 0]}, {"input_ids": ids})
    said = rf"line 2: the token id {wrong} is outside of the vocabulary \(0 … 8,191\)"
    with pytest.raises(ConvertError, match=said):
        read_samples([path], tokenizer)
    with pytest.raises(ConvertError, match=r"line 1: the token id 8,191 is outside"):
        read_samples([path], tokenizer, vocab_size=8000)


def test_samples_without_a_token_that_counts_are_not_run(tokenizer: Any, tmp_path: Path) -> None:
    """They are counted; if all are so, it is an error."""
    masked, kept = {"input_ids": [1], "loss_mask": [0]}, {"input_ids": [2, 3]}
    found = read_samples([write(tmp_path / "a.jsonl", masked, kept)], tokenizer)
    assert (len(found.samples), found.wholly_masked, found.seen, found.tokens) == (1, 1, 3, 2)
    with pytest.raises(ConvertError, match="all of its 1 tokens are masked"):
        read_samples([write(tmp_path / "a.jsonl", masked)], tokenizer)
    for path in (write(tmp_path / "none.jsonl"), write(tmp_path / "none.txt")):
        with pytest.raises(ConvertError, match=f"{path}: holds no samples"):
            read_samples([path], tokenizer)


def test_a_hidden_structure_forbids_masks_by_it_only(tokenizer: Any, tmp_path: Path) -> None:
    """Nothing is guessed; without such masks the samples are used, and their kind is not said."""
    hiding = "{% for m in messages %}{{ m.content }} ({{ m.content | length }}){% endfor %}"
    own = with_template(tokenizer, hiding)
    path = write(tmp_path / "a.jsonl", trace(0), trace(1))
    with pytest.raises(ConvertError, match=r"line 1: the chat template hides .* template, tools cannot be masked"):
        read_samples([path], own, parse_mask("template,tools:first,repeated"))
    found = read_samples([path], own, parse_mask("repeated"))
    assert set(np.flatnonzero(found.counts.sum(1))) == {TokenKind.TEXT}


def test_the_digest_is_of_all_that_calibration_depends_on() -> None:
    """Tokens, masks and where samples end; not where they came from, nor why a token is masked."""

    def digest(*samples: tuple[list[int], list[int]]) -> str:
        made = [
            Sample(np.array(t, np.int32), np.zeros(len(t), np.uint8), np.array(m, np.uint8), str(n))
            for n, (t, m) in enumerate(samples)
        ]
        return SampleSet(tuple(made), count(made)).digest

    assert digest(([1, 2], [0, 1])) == digest(([1, 2], [0, 3]))
    different = [
        digest(([1, 2], [0, 1])),
        digest(([1, 2], [1, 0])),
        digest(([2, 1], [0, 1])),
        digest(([1], [0]), ([2], [1])),
        hashlib.sha256().hexdigest(),
    ]
    assert len(set(different)) == len(different)


def test_without_transformers_the_extra_is_named() -> None:
    """In one line; and the room is imported without it."""
    code = (
        "import sys\nsys.modules.update(transformers=None, jinja2=None)\n"
        "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
        "from pathlib import Path\nfrom convert_w4a8.errors import ConvertError\n"
        "import convert_w4a8.samples.read\nfrom convert_w4a8.samples.tokenizer import open_tokenizer\n"
        "try: open_tokenizer(Path('.'))\nexcept ConvertError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path.cwd())
    assert done.stdout == "--data: tokens need transformers and jinja2; pip install './w4a8-convert[quantize]'\n"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no tokenizer that transformers opens"),
        ({"tokenizer.json": "{"}, "has no tokenizer that transformers opens"),
        (
            {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["a.B", null]}}', "a.py": "raise SystemExit(3)"},
            "has no tokenizer that transformers opens",
        ),
    ],
)
def test_directories_without_a_tokenizer(tmp_path: Path, files: dict[str, str], said: str) -> None:
    """One line each; a checkpoint's own code is not run."""
    pytest.importorskip("transformers", reason="the extra `quantize` is not installed")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConvertError, match=said) as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_samples_of_64k_tokens_are_whole(tokenizer: Any, tmp_path: Path) -> None:
    """With a template that is rendered several times for it."""
    own = with_template(tokenizer, TEMPLATES["reasoning"])
    text = "\n".join(f"value_{n} = compute({n}, {n * 17 % 1001})" for n in range(5000))
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": "Done."}]
    (sample,) = read_samples([write(tmp_path / "a.jsonl", {"messages": said})], own, parse_mask("template")).samples
    assert len(sample) > 64_000
    assert text in text_of(own, sample, kept=True)
