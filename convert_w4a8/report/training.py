"""The curve of a training."""

from typing import Any, Protocol

from convert_w4a8.report.drawing import new_figure, png, style


class Point(Protocol):
    """A point of the curve: divergences in nats per token."""

    @property
    def step(self) -> int:
        """After how many steps."""

    @property
    def training(self) -> float | None:
        """Of the batches since the last point."""

    @property
    def held_out(self) -> float:
        """Of the held-out samples."""


class Training(Protocol):
    """What is drawn of a training."""

    @property
    def curve(self) -> "tuple[Any, ...]":
        """The points, each a `Point`."""

    @property
    def best_step(self) -> int:
        """The step whose values were kept."""


def draw(result: Training) -> bytes:
    """Return a PNG: divergence of training and held-out text by step, and the step that was kept.

    Raises:
        ConvertError: matplotlib is not installed.

    """
    with style():
        figure = new_figure(4.0)
        axes = figure.subplots()
        points: tuple[Point, ...] = result.curve
        axes.plot([p.step for p in points], [p.held_out for p in points], "o-", color="#0072B2", label="held out")
        trained = [p for p in points if p.training is not None]
        axes.plot([p.step for p in trained], [p.training for p in trained], ".-", color="#E69F00", label="training")
        axes.axvline(result.best_step, color="#555555", linewidth=1, linestyle="--", label="kept")
        axes.set_xlabel("step")
        axes.set_ylabel("KL, nats per token")
        axes.set_title("Divergence of the predictions from the teacher's")
        axes.set_ylim(bottom=0)
        axes.legend()
        return png(figure)
