"""What ran where on a cluster, and for how long: for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from convert_w4a8.text import counted, human_seconds, printable


@dataclass(frozen=True)
class Ran:
    """Where a task was carried out, how long that took in seconds, and how many attempts there were.

    by_command: whether the process of the command did it itself.
    """

    task: str
    node: str
    seconds: float
    attempts: int
    by_command: bool = False


def as_dict(ran: Sequence[Ran]) -> dict[str, Any]:
    """Return tasks in the order in which they were finished, and sums by node."""
    nodes = {
        node: {"tasks": len(ours), "seconds": sum(each.seconds for each in ours)}
        for node, ours in _by_node(ran).items()
    }
    return {"nodes": nodes, "tasks": [asdict(each) for each in ran]}


def as_text(ran: Sequence[Ran]) -> str:
    """Return a line: how many tasks each node carried out, and how many attempts were lost or not needed."""
    parts = [f"{printable(node)}: {_summary(ours)}" for node, ours in _by_node(ran).items()]
    more = sum(each.attempts - 1 for each in ran)
    again = f"; {counted(more, 'further attempt')}" if more else ""
    return f"ray        {'; '.join(parts) or 'nothing was left to do'}{again}"


def _summary(ran: Sequence[Ran]) -> str:
    seconds, ours = human_seconds(sum(each.seconds for each in ran)), sum(each.by_command for each in ran)
    return f"{counted(len(ran), 'task')}, {seconds}" + (f" ({ours} by this process)" if ours else "")


def _by_node(ran: Sequence[Ran]) -> dict[str, list[Ran]]:
    found: dict[str, list[Ran]] = {}
    for each in sorted(ran, key=lambda each: each.node):
        found.setdefault(each.node, []).append(each)
    return found
