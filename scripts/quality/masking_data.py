"""The data of masking_experiment.py: the same pieces of text alone and behind one system prompt.

The text is the standard library's sources (make_calibration.py). A prompt is of another kind, tools described in
English and JSON, or of the same kind as the text: sources of a module that gives no pieces.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from make_calibration import HubTokenizer, library, unlike, windows_of

from convert_w4a8.samples.masks import NO_MASK, parse_mask
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import SampleSet, TokenKind
from convert_w4a8.samples.tokenizer import Tokenizer, open_tokenizer

CLEAN, TRACES = "clean.jsonl", "traces.jsonl"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)[:1]},
        },
    }
    for name, description, properties in (
        (
            "look_up_order",
            "Returns an order of the shop with its items, its state, and where the parcel was seen last.",
            {
                "order": {"type": "string", "description": "The number on the invoice, such as B-20417"},
                "with_items": {"type": "boolean", "description": "Whether to list the items", "default": True},
            },
        ),
        (
            "search_catalogue",
            "Finds articles by words, colour and price, the best matches first. At most fifty are returned.",
            {
                "words": {"type": "string", "description": "What the customer is looking for, in their own words"},
                "colour": {"type": "string", "enum": ["black", "white", "red", "green", "blue", "other"]},
                "price_up_to": {"type": "number", "description": "In euros, taxes included"},
            },
        ),
        (
            "book_return",
            "Books the return of an article and returns a label as a link. Ask for the reason before.",
            {
                "order": {"type": "string", "description": "The number on the invoice"},
                "article": {"type": "integer", "description": "Its place on the invoice, from 1 on"},
                "reason": {"type": "string", "enum": ["damaged", "wrong size", "late", "changed mind"]},
            },
        ),
    )
]
LIBRARY = Path(json.__file__).parents[1]
SOURCES = LIBRARY / "json" / "decoder.py"
"""Of the prompt that is of the same kind as the text."""


def _of_tools() -> str:
    return (
        "You answer customers of a shop for outdoor clothing. Be friendly and short, and use the customer's language."
        " Say only what a tool has told you; if no tool can know it, hand the conversation to a person. Never promise a"
        " date, a refund or a discount. Call one tool at a time and wait for what it returns. These are the tools, as"
        " JSON schemas; a call is one line of JSON with the keys name and arguments.\n" + json.dumps(TOOLS, indent=1)
    )


def _of_sources() -> str:
    return SOURCES.read_text(encoding="utf-8")[: len(_of_tools())]


PROMPTS: Mapping[str, Callable[[], str]] = {"tools": _of_tools, "sources": _of_sources}


@dataclass(frozen=True)
class Arm:
    """One way to use the data."""

    name: str
    file: str
    mask: str


ARMS = (
    Arm("clean", CLEAN, ""),
    Arm("unmasked", TRACES, ""),
    Arm("template", TRACES, "template,system"),
    Arm("repeated", TRACES, "repeated"),
)


def trace(prompt: str, text: str) -> list[dict[str, str]]:
    """Return a chat with the prompt and a piece of text as the question."""
    return [{"role": "system", "content": prompt}, {"role": "user", "content": text}]


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """Return how many tokens of a trace are the same in all."""
    rendered = tokenizer.apply_chat_template(trace(prompt, "x"), tokenize=True, return_dict=True)
    return len(rendered["input_ids"]) - 1


def write_data(model: Path, work: Path, texts: list[Path], prompt: str, share: float, samples: int, seed: int) -> None:
    """Write clean.jsonl and traces.jsonl of the same pieces, none of which is of the evaluation texts.

    share: of all tokens that the prompt has. samples: how many pieces.
    """
    tokenizer = open_tokenizer(model)
    length = round(prompt_tokens(tokenizer, prompt) * (1 - share) / share)
    sources = SOURCES.read_text(encoding="utf-8")
    kept = unlike(library(LIBRARY), [*(path.read_text(encoding="utf-8") for path in texts), sources], 0.02)
    pieces = windows_of(kept, HubTokenizer(model), samples, length, per_file=2, seed=seed)
    work.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        (CLEAN, [{"text": text} for text in pieces]),
        (TRACES, [{"messages": trace(prompt, t)} for t in pieces]),
    ):
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_arm(arm: Arm, work: Path, tokenizer: Tokenizer) -> SampleSet:
    """Read the samples of an arm, and say what they hold."""
    samples = read_samples([work / arm.file], tokenizer, parse_mask(arm.mask) if arm.mask else NO_MASK)
    prompt = 1 - int(samples.counts[[TokenKind.TEXT, TokenKind.USER]].sum()) / samples.seen
    print(f"{arm.name:<9} {samples.seen:>7,} tokens, {samples.kept:>7,} count; the prompt has {prompt:.1%}")
    return samples
