"""What a node is called with and answers, and what Ray says of it instead, where a worker or the node is lost."""

import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from convert_w4a8.errors import ClusterError, ConvertError, DiskError, PlanError, Problem, W4A8Error
from convert_w4a8.version import __version__


def packed_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, bytes, list[Any]]:
    """Return what a node is called with: our version, a pickle, and large arrays, which only Ray's store copies."""
    apart: list[pickle.PickleBuffer] = []
    return __version__, pickle.dumps((function, arguments), protocol=5, buffer_callback=apart.append), apart


@lru_cache(1)
def remote_function(ray: Any) -> Any:
    """Return what Ray sends to nodes; once, for it keeps each that it is given."""
    return ray.remote(max_retries=0)(entry())


def entry() -> Callable[[str, bytes, list[Any]], dict[str, Any]]:
    """Return what Ray calls on a node. It travels by value, and unpickles our things if the version is ours."""

    def carry_out(version: str, payload: bytes, apart: list[Any]) -> dict[str, Any]:
        import pickle as pickles  # noqa: PLC0415
        import time as clock  # noqa: PLC0415

        import ray  # noqa: PLC0415

        started = clock.monotonic()
        answer: dict[str, Any] = {"node": ray.get_runtime_context().get_node_id(), "version": None, "broken": ""}
        try:
            from convert_w4a8.errors import ConvertError, PlanError, W4A8Error  # noqa: PLC0415
            from convert_w4a8.version import __version__ as ours  # noqa: PLC0415

            answer["version"] = ours
            if ours != version:
                return answer
            # From the driver, through Ray, which does so, too.
            function, arguments = pickles.loads(payload, buffers=apart)  # noqa: S301
        except Exception as error:  # noqa: BLE001 - whatever a node cannot import, the node is at fault
            absent = isinstance(error, ModuleNotFoundError) and error.name == "convert_w4a8"
            answer["broken"] = "" if absent else f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return answer
        try:
            answer["value"] = function(*arguments)
        except W4A8Error as error:
            found = error.problems if isinstance(error, PlanError) else ()
            found = (error.problem,) if isinstance(error, ConvertError) else found
            answer["problems"] = [(each.subject, each.reason, each.remedy) for each in found]
            answer["kind"] = type(error).__name__
            answer["notes"] = list(getattr(error, "__notes__", ()))
        answer["seconds"] = clock.monotonic() - started
        return answer

    return carry_out


def value_of(answer: dict[str, Any]) -> Any:
    """Return a task's result, or raise what it raised."""
    if "problems" not in answer:
        return answer["value"]
    problems = [Problem(*parts) for parts in answer["problems"]]
    kinds = {kind.__name__: kind for kind in (PlanError, ConvertError, DiskError, ClusterError)}
    kind = kinds.get(answer["kind"], ConvertError)
    (first, *_) = problems
    error: W4A8Error = (
        PlanError(problems) if kind is PlanError else kind(first.subject, first.reason, first.remedy)  # type: ignore[call-arg, arg-type]
    )
    for note in (*answer["notes"], f"on node {answer['node']}"):
        error.add_note(note)
    raise error


def why_lost(error: Exception) -> str:
    """Return in words what Ray says of an attempt that is lost."""
    words = {
        "WorkerCrashedError": "its process was killed",
        "OutOfMemoryError": "it was killed because memory ran out",
        "NodeDiedError": "its node was lost",
        "LocalRayletDiedError": "its node was lost",
        "OwnerDiedError": "its node was lost",
        "ObjectLostError": "its result was lost with its node",
        "ObjectFetchTimedOutError": "its result was lost with its node",
    }
    return words.get(type(error).__name__, type(error).__name__)
