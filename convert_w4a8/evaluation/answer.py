"""What came back from a server for one prompt, as it is kept in a file."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from convert_w4a8.evaluation.checks import Call

Side = Literal["baseline", "candidate"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Answer:
    """One answer, or a failure. Times are in seconds from when the request was sent.

    first_token, last_token: when the first and the last piece of the answer came. tokens: as the server counts them in
    `usage`; None where it does not. token_ids, prompt_token_ids: where the server gives them (vLLM).
    failure: why there is no whole answer, by name (`dead: …`), or None.
    """

    side: Side
    prompt: str
    sample: int
    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    finish: str | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    failure: str | None = None

    @property
    def time_per_token(self) -> float | None:
        """Seconds per token after the first; None of a single token, or where tokens were not counted."""
        if (
            self.failure
            or self.tokens is None
            or self.tokens < 2
            or self.last_token is None
            or self.first_token is None
        ):
            return None
        return (self.last_token - self.first_token) / (self.tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the answer by the time from the request to the last one."""
        return self.tokens / self.last_token if not self.failure and self.tokens and self.last_token else None

    @property
    def shown(self) -> str:
        """All that the model wrote, as people read it."""
        parts = [f"[reasoning] {self.reasoning}"] if self.reasoning else []
        parts += [self.text] if self.text else []
        return "\n".join(parts + [f"{call.name}({call.arguments})" for call in self.calls])

    @property
    def key(self) -> tuple[Side, str, int]:
        """What it answers."""
        return self.side, self.prompt, self.sample

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Answer":
        """Return what `as_dict` was made from. Raises TypeError, KeyError or ValueError where it is none."""
        calls = tuple(Call(call["name"], call["arguments"]) for call in found["calls"])
        ids = {key: None if found[key] is None else tuple(found[key]) for key in ("prompt_token_ids", "token_ids")}
        return cls(**(found | {"calls": calls} | ids))
