"""Ask both sides every prompt, in turn, and keep what comes."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation import metrics
from convert_w4a8.evaluation.answer import SIDES, Answer, Side
from convert_w4a8.evaluation.client import Endpoint, Sampling
from convert_w4a8.evaluation.divergence import score_side, unread
from convert_w4a8.evaluation.logs import Logs
from convert_w4a8.evaluation.prompts import Prompt
from convert_w4a8.evaluation.servers import Caps, is_url, serve
from convert_w4a8.evaluation.store import Store

_WARM_UP_TOKENS = 16
_WARM_UPS = 8
"""Prompts to warm up with, or as many as are asked at once."""
_GIVE_UP = 5
"""So many answers in a row, or as many as are asked for at once, that a dead or hung server fails to give."""
_GONE = ("dead", "hung")
_USELESS = ("status 401", "status 403", "status 404")
"""What will be no different for another prompt."""
Job = tuple[Prompt, int]


@dataclass(frozen=True)
class Plan:
    """What is asked, and of whom.

    places: a URL or a directory for each side. models: as the servers name them; None: the first that one lists.
    server: what serves directories. timeout: seconds that an answer may take. rounds: into how many parts prompts are
    divided, where one server runs after the other. logs: where the prompts come from, and perhaps the answers.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    places: Mapping[Side, str]
    models: Mapping[Side, str | None]
    server: str
    caps: Caps
    concurrency: int
    timeout: float
    rounds: int = 1
    logs: Logs | None = None

    @property
    def jobs(self) -> list[Job]:
        """Every prompt, as often as it is asked."""
        return [(prompt, sample) for sample in range(self.sampling.samples) for prompt in self.prompts]


def carry_out(plan: Plan, store: Store, *, progress: Callable[[int], None], say: Callable[[str], None]) -> None:
    """Get every answer that is not there yet; two URLs in turn, directories one after the other.

    progress: called with the number of answers that came since the last call. say: called with a line for people.
    Raises ConvertError where a server cannot be started or reached, or dies; what it answered is kept.
    """
    if plan.logs is not None and plan.logs.answers:
        for answer in plan.logs.answers:
            if answer.key not in store.answers:
                store.add(answer)
            progress(1)
        return
    if all(is_url(plan.places[side]) for side in SIDES):
        if any(_unfinished(plan, store, side) for side in SIDES):
            asyncio.run(_session(plan, store, plan.places, progress, plan.jobs))
        return
    turns = _turns(plan)
    for number, turn in enumerate(turns):
        last = all(later.side != turn.side for later in turns[number + 1 :])
        if _unfinished(plan, store, turn.side) if last else _unanswered(store, turn.side, turn.jobs):
            _take_turn(plan, store, turn, progress, say, last=last)


@dataclass(frozen=True)
class _Turn:
    """One server and what it is asked before the other one takes its place."""

    side: Side
    jobs: Sequence[Job]


def _turns(plan: Plan) -> list[_Turn]:
    """Return who is asked what, one after the other: A B for one round, B A A B for two, A B B A A B for three.

    What drifts steadily, such as the clocks of a GPU that gets warm, then strikes both sides alike. The candidate is
    the last one, since it reads all of the baseline's answers. A side that comes twice in a row is one turn.
    """
    order = list(SIDES if plan.rounds % 2 else reversed(SIDES))
    found: list[_Turn] = []
    for number in range(plan.rounds):
        jobs = plan.jobs[number :: plan.rounds]
        for side in order:
            if found and found[-1].side == side:
                found[-1] = _Turn(side, [*found[-1].jobs, *jobs])
            else:
                found.append(_Turn(side, jobs))
        order.reverse()
    return found


def _take_turn(
    plan: Plan,
    store: Store,
    turn: _Turn,
    progress: Callable[[int], None],
    say: Callable[[str], None],
    *,
    last: bool,
) -> None:
    place = plan.places[turn.side]
    if is_url(place):
        asyncio.run(_session(plan, store, {turn.side: place}, progress, turn.jobs, score=last))
        return
    directory = Path(place).resolve()
    with serve(turn.side, directory, plan.server, plan.caps, say) as url:
        named = replace(plan, models={**plan.models, turn.side: plan.models[turn.side] or str(directory)})
        asyncio.run(_session(named, store, {turn.side: url}, progress, turn.jobs, score=last))


def _unanswered(store: Store, side: Side, jobs: Sequence[Job]) -> bool:
    return any(not store.has((side, prompt.id, sample)) for prompt, sample in jobs)


def _unfinished(plan: Plan, store: Store, side: Side) -> bool:
    return _unanswered(store, side, plan.jobs) or unread(side, baseline_answers(store), store.noted)


async def _session(
    plan: Plan,
    store: Store,
    urls: Mapping[Side, str],
    progress: Callable[[int], None],
    jobs: Sequence[Job],
    *,
    score: bool = True,
) -> None:
    """Talk to the servers that run now. jobs: what they are asked. score: have them read answers."""
    async with AsyncExitStack() as stack:
        endpoints = [
            await stack.enter_async_context(Endpoint(side, url, plan.models[side], plan.timeout))
            for side, url in urls.items()
        ]
        for endpoint in endpoints:
            await endpoint.find_model()
            _same_model(endpoint, store)
            await _warm_up(endpoint, plan)
        async with AsyncExitStack() as watching:
            watches = [await watching.enter_async_context(metrics.Watch(endpoint.base_url)) for endpoint in endpoints]
            await _ask_all(plan, store, endpoints, progress, jobs)
            for endpoint, watch in zip(endpoints, watches, strict=True):
                name, room = f"room {endpoint.side}", metrics.as_dict(await watch.result())
                store.note(name, metrics.merged(store.noted.get(name), room))
        if not score:
            return
        answers = baseline_answers(store)
        for endpoint in endpoints:
            await score_side(endpoint, answers, store, plan.concurrency)


def _same_model(endpoint: Endpoint, store: Store) -> None:
    """Note which model answers. Raises ConvertError where another one did before."""
    name = f"model {endpoint.side}"
    before = store.noted.get(name, endpoint.model)
    if before != endpoint.model:
        reason = f"serves {endpoint.model}; what it answered before was {before}"
        raise ConvertError(
            f"{endpoint.side} {endpoint.base_url}", reason, "serve that one again, or choose another --out"
        )
    if name not in store.noted:
        store.note(name, endpoint.model)


def baseline_answers(store: Store) -> list[Answer]:
    """Return the baseline's whole answers, the first of each prompt."""
    return [a for a in store.answers.values() if a.side == "baseline" and a.sample == 0 and not a.failure]


async def _warm_up(endpoint: Endpoint, plan: Plan) -> None:
    """Have a server compile and allocate what its first answers need. Raises ConvertError where it cannot answer.

    It is asked some of the prompts, since kernels may be compiled for lengths; each with another beginning, so that the
    prefix cache has nothing of what is asked later.
    """
    sampling, size = replace(plan.sampling, max_tokens=_WARM_UP_TOKENS), plan.concurrency
    number = max(size, min(_WARM_UPS, len(plan.prompts)))
    prompts = [_begun(plan.prompts[place * len(plan.prompts) // number], place) for place in range(number)]
    for start in range(0, number, size):
        answers = await asyncio.gather(*(endpoint.ask(prompt, 0, sampling) for prompt in prompts[start : start + size]))
        failures = [answer.failure or "" for answer in answers]
        useless = [failure for failure in failures if any(status in failure for status in _USELESS)]
        gone = start == 0 and all(failure.startswith(_GONE) for failure in failures)
        if gone or useless:
            remedy = f"look at the server, and at --{endpoint.side}-model and OPENAI_API_KEY"
            raise ConvertError(f"{endpoint.side} {endpoint.base_url}", (useless or failures)[0], remedy)


def _begun(prompt: Prompt, number: int) -> Prompt:
    """Return a prompt with another beginning, as far as that is text."""
    if prompt.messages is None:
        return replace(prompt, prompt=f"({number}) {prompt.prompt}", max_tokens=None)
    first, *others = prompt.messages
    if isinstance(first.get("content"), str):
        first = first | {"content": f"({number}) {first['content']}"}
    return replace(prompt, messages=[first, *others], max_tokens=None)


async def _ask_all(
    plan: Plan, store: Store, endpoints: Sequence[Endpoint], progress: Callable[[int], None], jobs: Sequence[Job]
) -> None:
    """Ask in blocks of `concurrency`, first one side and then the other, the next block the other way round."""
    size = plan.concurrency
    failed = dict.fromkeys(SIDES, 0)

    async def ask(endpoint: Endpoint, job: Job) -> None:
        answer = await endpoint.ask(*job, plan.sampling)
        store.add(answer)
        progress(1)
        gone = (answer.failure or "").startswith(_GONE)
        failed[endpoint.side] = failed[endpoint.side] + 1 if gone else 0
        if failed[endpoint.side] >= max(_GIVE_UP, size):
            reason = f"{answer.failure} ({failed[endpoint.side]} times in a row)"
            raise ConvertError(f"{endpoint.side} {endpoint.base_url}", reason, "start it again, then pass --resume")

    for number, start in enumerate(range(0, len(jobs), size)):
        block = jobs[start : start + size]
        for endpoint in endpoints if number % 2 == 0 else reversed(endpoints):
            todo = [job for job in block if not store.has((endpoint.side, job[0].id, job[1]))]
            await asyncio.gather(*(ask(endpoint, job) for job in todo))
