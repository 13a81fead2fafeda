"""A whole evaluation: from what the user names to what was found."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.errors import ConvertError, W4A8Error
from convert_w4a8.evaluation import run
from convert_w4a8.evaluation.client import Sampling
from convert_w4a8.evaluation.library import library
from convert_w4a8.evaluation.logs import read_logs
from convert_w4a8.evaluation.options import EvaluateOptions
from convert_w4a8.evaluation.prompts import read_prompts
from convert_w4a8.evaluation.ratings import read_ratings
from convert_w4a8.evaluation.results import Evaluation, collect
from convert_w4a8.evaluation.run import Plan
from convert_w4a8.evaluation.servers import Caps, check_directory, check_url, find_server, is_url
from convert_w4a8.evaluation.store import FILE, Store
from convert_w4a8.evaluation.verdict import Tolerance


@dataclass(frozen=True)
class Prepared:
    """What is to be done, read and checked. identity: what answers depend on, JSON-ready."""

    plan: Plan
    tolerance: Tolerance
    identity: dict[str, Any]


def prepare(
    baseline: str | None, candidate: str | None, prompts: Path | None, logs: Sequence[Path], options: EvaluateOptions
) -> Prepared:
    """Read and check everything that can be checked before a server is asked.

    baseline, candidate: a URL or a directory each; None for both: the answers are in the logs. prompts, logs: one of
    them.

    Raises:
        ValueError: arguments do not go together.
        ConvertError: a file, a directory or an address is not as it should be.

    """
    if (prompts is None) == (not logs):
        raise ValueError("give either prompts or logs")
    if not (baseline and candidate) and (baseline or candidate or prompts):
        raise ValueError("give both baseline and candidate; only logs that hold the answers of both need neither")
    if not baseline and options.samples > 1:
        raise ValueError("several samples need servers: logs have one answer of each side")
    library("openai", "openai")
    logged = read_logs(logs, options.requests, answered=baseline is None) if logs else None
    found = read_prompts(prompts) if prompts is not None else logged.prompts  # type: ignore[union-attr]
    of_logs = f"what {', '.join(path.name for path in logs)} has"
    places = {"baseline": baseline or of_logs, "candidate": candidate or of_logs}
    local = [name for name in places if baseline and not is_url(places[name])]
    for name, place in places.items() if baseline else ():
        if name in local:
            check_directory(name, place)  # type: ignore[arg-type]
        else:
            check_url(name, place)
    sampling = Sampling(options.max_tokens, options.samples, options.temperature)
    caps = Caps(options.max_model_len, options.concurrency, options.start_timeout, tuple(options.serve_options))
    plan = Plan(
        prompts=found.prompts,
        sampling=sampling,
        places=places,  # type: ignore[arg-type]
        models={"baseline": options.baseline_model, "candidate": options.candidate_model},
        server=find_server(options.server) if local else "",
        caps=caps,
        concurrency=options.concurrency,
        timeout=options.timeout,
        rounds=options.rounds,
        logs=logged,
    )
    return Prepared(plan, _tolerance(plan, options), _identity(plan, found.digest, local))


def evaluate(
    prepared: Prepared,
    out: Path | None,
    *,
    resume: bool = False,
    ratings: Path | None = None,
    progress: Callable[[int], None] = lambda _number: None,
    say: Callable[[str], None] = lambda _line: None,
) -> Evaluation:
    """Get the answers and compare them. `2 * len(plan.jobs)` are asked for.

    out: a directory where answers are kept, and `resume` finds them. ratings: a file of ratings of the answers in
    `out`; no server is asked then. progress: called with the number of answers that came. say: called with a line for
    people.

    Raises ConvertError where a server fails, or `out` or the ratings are of something else.
    """
    if out is None and (resume or ratings is not None):
        raise ValueError("resume and ratings need the directory of the run that they go on with")
    if out is not None and ratings is not None and not (out / FILE).exists():
        raise ConvertError(str(out), "has no answers that could be rated", "name the --out of the run that was rated")
    private = prepared.plan.logs is not None
    with Store(out, prepared.identity, resume=resume or ratings is not None, private=private) as store:
        try:
            if ratings is None:
                run.carry_out(prepared.plan, store, progress=progress, say=say)
        except (W4A8Error, KeyboardInterrupt) as error:
            error.add_note("what was answered is kept, and --resume continues" if out else "no answers are kept")
            raise
        answers = store.digest()
        asked = {(prompt.id, sample) for prompt, sample in prepared.plan.jobs}
        rated = {} if ratings is None else read_ratings(ratings, answers, asked)
        return collect(prepared.plan, store, prepared.tolerance, rated, answers)


def _tolerance(plan: Plan, options: EvaluateOptions) -> Tolerance:
    by_tag = dict(options.tag_tolerance or {})
    of_all = by_tag.pop("", options.tolerance)
    odd = sorted(by_tag.keys() - {tag for prompt in plan.prompts for tag in prompt.tags})
    if odd:
        raise ConvertError(f"--tag-tolerance {odd[0]}", "no prompt has this tag", "name a tag of the prompts")
    return Tolerance(options.tolerance, of_all, by_tag, options.max_divergence)


def _identity(plan: Plan, digest: str, local: Sequence[str]) -> dict[str, Any]:
    """Return what answers depend on."""
    sides: dict[str, list[Any]] = {
        side: [plan.places[side], plan.models[side], *(contents(plan.places[side]) if side in local else ())]
        for side in plan.places
    }
    return {
        "prompts": digest,
        **sides,
        "max_tokens": plan.sampling.max_tokens,
        "samples": plan.sampling.samples,
        "temperature": plan.sampling.temperature,
        "concurrency": plan.concurrency,
        "serve_options": _digest(plan.caps.options),
        **({"server": plan.server, "max_model_len": plan.caps.max_model_len} if local else {}),
        "rounds": plan.rounds,
    }


def _digest(options: Sequence[str]) -> str:
    """Return what tells options of a server from others, and does not say them: a key may be among them."""
    return hashlib.sha256(json.dumps(options).encode()).hexdigest() if options else ""


def contents(directory: str) -> list[Any]:
    """Return what tells a directory from one that replaced it: names, sizes and times of its files."""
    files = sorted(path for path in Path(directory).iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
