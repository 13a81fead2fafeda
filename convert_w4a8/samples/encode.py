"""Records as tokens, each with what it is."""

import re

import numpy as np
import numpy.typing as npt

from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.chat import render
from convert_w4a8.samples.lines import Record
from convert_w4a8.samples.sample import TokenKind
from convert_w4a8.samples.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]
"""[T]."""
Kinds = npt.NDArray[np.uint8]
"""`TokenKind`, [T]."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Where a template says by itself what the model writes (transformers' `return_assistant_tokens_mask`)."""


def encode(tokenizer: Tokenizer, record: Record, vocab_size: int) -> tuple[Tokens, Kinds | None]:
    """Return the tokens of a record and what each of them is; None where the chat template hides it.

    The tokens of messages are those of `apply_chat_template`, the tokens of a text those that the tokenizer makes by
    default, perhaps with a first one of its own.

    Raises:
        ConvertError: the template refuses the messages, or an id is outside of the vocabulary.

    """
    if record.messages is not None:
        ids, kinds = _encode_chat(tokenizer, record)
    elif record.text is not None:
        encoding = tokenizer(record.text, return_special_tokens_mask=True, verbose=False)
        ids = encoding["input_ids"]
        kinds = np.where(np.array(encoding["special_tokens_mask"]) == 1, TokenKind.TEMPLATE, TokenKind.TEXT)
    else:
        ids = record.input_ids or []
        kinds = np.full(len(ids), TokenKind.TEXT)
    wrong = next((number for number in ids if not 0 <= number < vocab_size), None)
    if wrong is not None:
        reason = f"the token id {wrong:,} is outside of the vocabulary (0 … {vocab_size - 1:,})"
        raise ConvertError(record.origin, reason, "use the tokenizer that belongs to the model")
    if not ids:
        raise ConvertError(record.origin, "holds no tokens", "leave the line out")
    return np.array(ids, np.int32), None if kinds is None else kinds.astype(np.uint8)


def _encode_chat(tokenizer: Tokenizer, record: Record) -> tuple[list[int], npt.NDArray[np.uint8] | None]:
    """Return the tokens of messages, and what each of them is."""
    messages = record.messages or []
    rendered = render(tokenizer, messages, record.tools, record.origin)
    encoding = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoding["input_ids"]
    if rendered.kinds is None:
        return ids, None
    kinds = token_kinds(rendered.kinds, np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2))
    if _GENERATION.search(str(tokenizer.get_chat_template(tools=record.tools))):
        marked = tokenizer.apply_chat_template(
            messages, tools=record.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if marked["input_ids"] == ids:
            kinds[(np.array(marked["assistant_masks"]) == 1) & (kinds == TokenKind.TEMPLATE)] = TokenKind.ASSISTANT
    return ids, kinds


def token_kinds(kinds: Kinds, offsets: npt.NDArray[np.int64]) -> Kinds:
    """Return what tokens are, uint8 [T], from what characters are: the first of a token's that is not the template's.

    kinds: `TokenKind` of each character. offsets: int64 [T, 2], the characters [start, end) of each token.
    """
    length = len(kinds)
    content = np.where(kinds == TokenKind.TEMPLATE, length, np.arange(length))
    following = np.append(np.minimum.accumulate(content[::-1])[::-1], length)
    found = following[np.minimum(offsets[:, 0], length)]
    end = np.maximum(offsets[:, 1], offsets[:, 0] + 1)  # a token of no characters is what follows it
    inside = found < end
    return np.where(inside, np.append(kinds, TokenKind.TEMPLATE)[np.minimum(found, length)], TokenKind.TEMPLATE).astype(
        np.uint8
    )
