"""Errors that are the user's to mend: what is wrong, why, and what to do about it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from convert_w4a8.text import printable, shortened


@dataclass(frozen=True)
class Problem:
    """One thing that cannot be converted: its subject, the reason, and the remedy."""

    subject: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        """Render as one line, whatever names and values a file has."""
        return "; ".join((f"{printable(self.subject)}: {printable(self.reason)}", self.remedy))

    def as_dict(self) -> dict[str, str]:
        """Return the three parts as a JSON-ready dict."""
        return asdict(self)


_NAMED = 6
"""Subjects that a group of problems names."""
_LISTED = 20
"""So many problems of one kind are listed one by one."""


@dataclass(frozen=True)
class ProblemGroup:
    """Problems of one reason and one remedy, or a single one: the first subjects, and how many there are."""

    first: Problem
    subjects: tuple[str, ...]
    count: int

    def __str__(self) -> str:
        """Render as one line."""
        subjects = shortened(self.subjects, self.count)
        return "; ".join((f"{subjects}: {printable(self.first.reason)}", self.first.remedy))

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict: the first problem, and of more than one the first subjects and the count."""
        several = {"subjects": list(self.subjects), "count": self.count} if self.count > 1 else {}
        return self.first.as_dict() | several


def grouped(problems: Sequence[Problem]) -> list[ProblemGroup]:
    """Group problems that differ in their subjects only: those of experts, and more than twenty of others.

    A group stands where its first problem stood.
    """
    found: dict[tuple[str, str, bool], list[Problem]] = {}
    for problem in problems:
        found.setdefault((problem.reason, problem.remedy, ".experts." in problem.subject), []).append(problem)
    groups: dict[Problem, ProblemGroup] = {}
    for (_, _, are_experts), alike in found.items():
        if are_experts or len(alike) > _LISTED:
            subjects = tuple(problem.subject for problem in alike[:_NAMED])
            groups[alike[0]] = ProblemGroup(alike[0], subjects, len(alike))
        else:
            groups |= {problem: ProblemGroup(problem, (problem.subject,), 1) for problem in alike}
    return [groups.pop(problem) for problem in problems if problem in groups]


class W4A8Error(Exception):
    """Base of every error that a caller can mend. Anything else that is raised is a bug of ours."""


class ConvertError(W4A8Error):
    """A single problem, shown to the user as one line."""

    def __init__(self, subject: str, reason: str, remedy: str) -> None:
        self.problem = Problem(subject, reason, remedy)
        super().__init__(str(self.problem))


class DiskError(ConvertError):
    """The system failed, not the input: what is finished is kept, and `--resume` continues once that is mended."""


class ClusterError(DiskError):
    """Nodes of a cluster failed, or are not as they have to be; what is finished is kept here, too."""


class PlanError(W4A8Error):
    """Everything in a checkpoint that cannot be converted, found before anything was written."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, grouped(self.problems))))
