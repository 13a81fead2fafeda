"""Chunks of answers: whatever a server sends, what came is an answer that can be kept, or it is said to be none."""

import json
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.evaluation.answer import Answer
from convert_w4a8.evaluation.stream import ODD, Parts

SCALARS = st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=3)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return objects with some of these fields, each as it should be or odd."""
    return st.fixed_dictionaries({}, optional={key: value | ANYTHING for key, value in fields.items()}) | ANYTHING


IDS = st.lists(st.integers(0, 9) | ANYTHING, max_size=3)
CALLS = st.lists(some(index=st.integers(0, 2), function=some(name=st.just("f"), arguments=st.just("{}"))), max_size=2)
DELTA = some(content=st.just("a"), reasoning=st.just("b"), tool_calls=CALLS)
REASON = st.sampled_from(["stop", "length", "abort"])
CHOICE = some(index=st.just(0), delta=DELTA, message=DELTA, text=st.just("c"), finish_reason=REASON, token_ids=IDS)
CHUNK = some(
    choices=st.lists(CHOICE, max_size=2), usage=some(completion_tokens=st.integers(0, 9)), prompt_token_ids=IDS
)


@given(st.lists(CHUNK, max_size=4))
def test_odd_chunks_do_no_harm(chunks: list[Any]) -> None:
    """Neither another error, nor an answer that cannot be written and read again."""
    parts = Parts(Answer("candidate", "a", 0))
    for chunk in chunks:
        with suppress(*ODD):
            parts.take(json.loads(json.dumps(chunk), object_hook=lambda found: SimpleNamespace(**found)), 1.0)
    whole = parts.whole()
    assert Answer.from_dict(json.loads(json.dumps(whole.as_dict()))) == whole
    assert isinstance(whole.text + whole.reasoning + "".join(c.name + c.arguments for c in whole.calls), str)
    assert whole.tokens is None or whole.tokens >= 0
    assert all(type(number) is int for number in (*(whole.token_ids or ()), *(whole.prompt_token_ids or ())))
    assert isinstance(parts.unfinished, str)
