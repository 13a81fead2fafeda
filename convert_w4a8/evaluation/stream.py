"""An answer as it comes, chunk by chunk, or whole: completions and chats, of the OpenAI protocol."""

from dataclasses import dataclass, field, replace
from typing import Any

from convert_w4a8.evaluation.answer import Answer
from convert_w4a8.evaluation.checks import Call

ODD = (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError)
"""What `Parts.take` raises for what is no chunk of an answer."""
_GIVEN_UP = ("abort", "error")
"""Of vLLM's `FINISH_REASON_STRINGS` (`vllm/v1/engine/__init__.py`): those of an answer that is not whole."""
_MOST = 2**31
"""More tokens than these, or a greater id, is none."""


@dataclass
class Parts:
    """What came so far. answer: all but the calls and the token ids, which are put together by `whole`."""

    answer: Answer
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    others: bool = False
    """Whether there are other choices (`n`), which are left out; `usage` counts them too."""

    def whole(self) -> Answer:
        """Return the answer."""
        calls = tuple(Call(call["name"], call["arguments"]) for _, call in sorted(self.calls.items()))
        tokens = None if self.others else self.answer.tokens
        return replace(self.answer, calls=calls, token_ids=tuple(self.ids) or None, tokens=tokens)

    @property
    def unfinished(self) -> str:
        """Why the answer is not whole, now that the stream is over; empty where it is."""
        if self.answer.finish in _GIVEN_UP:
            return f"the server gave up (finish_reason {self.answer.finish})"
        return "" if self.answer.finish else "no finish_reason came"

    def take(self, chunk: Any, now: float | None) -> None:
        """Add a chunk, or a whole response. now: seconds since the request was sent; None where that is not known.

        Raises one of `ODD` where it is none; the answer can be no whole one then, but what came can be kept.
        """
        answer = self.answer
        usage = getattr(chunk, "usage", None)
        if usage is not None and getattr(usage, "completion_tokens", None) is not None:
            answer = replace(answer, tokens=_number(usage.completion_tokens))
        prompt_ids = getattr(chunk, "prompt_token_ids", None)
        choices = [choice for choice in chunk.choices or () if not getattr(choice, "index", 0)]
        self.others |= len(choices) < len(chunk.choices or ())
        if choices:
            choice = choices[0]
            prompt_ids = prompt_ids or getattr(choice, "prompt_token_ids", None)
            self.ids += _ids(getattr(choice, "token_ids", None))
            said = getattr(choice, "delta", None) or getattr(choice, "message", None)
            text = getattr(said or choice, "content" if said else "text", None) or ""
            thought = getattr(said, "reasoning_content", None) or getattr(said, "reasoning", None) or ""
            calls = getattr(said, "tool_calls", None) or []
            for place, piece in enumerate(calls):
                index = _number(getattr(piece, "index", place) or 0)
                call = self.calls.setdefault(index, {"name": "", "arguments": ""})
                call["name"] += getattr(piece.function, "name", None) or ""
                call["arguments"] += getattr(piece.function, "arguments", None) or ""
            if text or thought or calls:
                first = now if answer.first_token is None else answer.first_token
                answer = replace(answer, first_token=first, last_token=now)
            answer = replace(answer, text=answer.text + text, reasoning=answer.reasoning + thought)
            finish = getattr(choice, "finish_reason", None)
            if finish is not None:
                if not isinstance(finish, str):
                    raise TypeError("finish_reason is no string")
                answer = replace(answer, finish=finish)
        if prompt_ids:
            answer = replace(answer, prompt_token_ids=tuple(_ids(prompt_ids)))
        self.answer = answer


def _ids(value: Any) -> list[int]:
    return [_number(number) for number in value or ()]


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError("a count or an id is no whole number")
    return value
