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
from convert_w4a8.evaluation.divergence import refusal_name, score_side
from convert_w4a8.evaluation.prompts import Prompt
from convert_w4a8.evaluation.servers import Caps, is_url, serve
from convert_w4a8.evaluation.store import Store

_WARM_UP_TOKENS = 16
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
    server: what serves directories. timeout: seconds that an answer may take.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    places: Mapping[Side, str]
    models: Mapping[Side, str | None]
    server: str
    caps: Caps
    concurrency: int
    timeout: float

    @property
    def jobs(self) -> list[Job]:
        """Every prompt, as often as it is asked."""
        return [(prompt, sample) for sample in range(self.sampling.samples) for prompt in self.prompts]


def carry_out(plan: Plan, store: Store, *, progress: Callable[[int], None], say: Callable[[str], None]) -> None:
    """Get every answer that is not there yet; two URLs in turn, directories one after the other.

    progress: called with the number of answers that came since the last call. say: called with a line for people.
    Raises ConvertError where a server cannot be started or reached, or dies; what it answered is kept.
    """
    todo = [side for side in SIDES if _unfinished(plan, store, side)]
    if all(is_url(plan.places[side]) for side in SIDES):
        if todo:
            asyncio.run(_session(plan, store, plan.places, progress))
        return
    for side in todo:
        place = plan.places[side]
        if is_url(place):
            asyncio.run(_session(plan, store, {side: place}, progress))
            continue
        directory = Path(place).resolve()
        with serve(side, directory, plan.server, plan.caps, say) as url:
            named = replace(plan, models={**plan.models, side: plan.models[side] or str(directory)})
            asyncio.run(_session(named, store, {side: url}, progress))


def _unfinished(plan: Plan, store: Store, side: Side) -> bool:
    answered = all(store.has((side, prompt.id, sample)) for prompt, sample in plan.jobs)
    return not answered or refusal_name(side) not in store.noted


async def _session(plan: Plan, store: Store, urls: Mapping[Side, str], progress: Callable[[int], None]) -> None:
    """Talk to the servers that run now."""
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
            await _ask_all(plan, store, endpoints, progress)
            for endpoint, watch in zip(endpoints, watches, strict=True):
                store.note(f"room {endpoint.side}", metrics.as_dict(await watch.result()))
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
    """Have a server compile and allocate what its first answers need. Raises ConvertError where it cannot answer."""
    sampling = replace(plan.sampling, max_tokens=_WARM_UP_TOKENS)
    prompt = replace(plan.prompts[0], max_tokens=None)
    for answer in await asyncio.gather(*(endpoint.ask(prompt, 0, sampling) for _ in range(plan.concurrency))):
        failure = answer.failure or ""
        if failure.startswith(_GONE) or any(status in failure for status in _USELESS):
            remedy = f"look at the server, and at --{endpoint.side}-model and OPENAI_API_KEY"
            raise ConvertError(f"{endpoint.side} {endpoint.base_url}", failure, remedy)


async def _ask_all(plan: Plan, store: Store, endpoints: Sequence[Endpoint], progress: Callable[[int], None]) -> None:
    """Ask in blocks of `concurrency`, first one side and then the other, the next block the other way round."""
    jobs, size = plan.jobs, plan.concurrency
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
