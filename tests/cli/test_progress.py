"""How far a command is: lines in a log, in time and number; never beside a bar."""

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_edits import write_case

from convert_w4a8.cli import progress as module
from convert_w4a8.cli.progress import ProgressLines, progress, storing_progress, training_progress
from convert_w4a8.text import human_seconds


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def lines_of(total: int, steps: list[tuple[float, int]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that come of steps: seconds that pass, and bytes that are done then."""
    clock = Clock()
    shown = ProgressLines(total, "convert", clock)
    for seconds, nbytes in steps:
        clock.now += seconds
        shown.update(nbytes)
    return capsys.readouterr().err.splitlines()


def test_a_line_has_label_share_sizes_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """2 of 8 GB in 20 s are 100 MB/s, and 60 s are left."""
    (line,) = lines_of(8 * 10**9, [(20, 2 * 10**9)], capsys)
    assert line == "convert     25%, 2 GB of 8 GB, 100 MB/s, 1 min 00 s left"


def test_a_line_every_ten_percent(capsys: pytest.CaptureFixture[str]) -> None:
    """When 1 % takes 2 s: after 10, 20, … %."""
    lines = lines_of(10_000, [(2, 100)] * 100, capsys)
    assert [line.split()[1] for line in lines] == [f"{percent}%," for percent in range(10, 101, 10)]


def test_a_line_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """When 1 % takes a minute: after each; when it takes 10 s: after every third."""
    assert len(lines_of(10_000, [(60, 100)] * 8, capsys)) == 8
    assert len(lines_of(10_000, [(10, 100)] * 9, capsys)) == 3


def test_what_is_quick_needs_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """None in the first ten seconds, nor sooner after another."""
    assert lines_of(10_000, [(0.09, 100)] * 100, capsys) == []
    assert len(lines_of(10_000, [(0.9, 500)] * 20, capsys)) == 1


def test_nothing_done_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    """No division by zero, no line about nothing, whatever the total is."""
    assert lines_of(0, [(60, 0), (60, 0)], capsys) == []
    assert lines_of(10, [(60, 0)], capsys) == []
    assert len(lines_of(10, [(60, 20)], capsys)) == 1  # more than was foretold: not beyond 100 %


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    """Two units at most."""
    assert human_seconds(seconds) == text


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither bar nor lines."""
    monkeypatch.setattr(module, "_LEAST_SECONDS", 0)
    for quiet in (True, False):
        with progress(100, "convert", quiet=quiet) as update:
            update(100)
        assert bool(capsys.readouterr().err) != quiet


def test_lines_of_a_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One every 30 s, and the last one; of the pass over the teacher, too."""
    clock = Clock()
    monkeypatch.setattr("convert_w4a8.cli.progress.time.monotonic", clock)
    stored = storing_progress(quiet=False)
    with training_progress(5, quiet=False) as trained:
        for step in range(1, 6):
            clock.now += 20
            trained(step, 0.5)
            stored(1000 * step, 5000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[::2] == [f"distill    step {step} of 5, KL 0.50000 nats per token" for step in (2, 4, 5)]
    assert lines[1::2] == [f"teacher    {step},000 of 5,000 tokens written" for step in (2, 4, 5)]


@pytest.mark.parametrize(
    ("flags", "shown"), [([], True), (["--quiet"], False), (["--json"], False)], ids=["plain", "quiet", "json"]
)
def test_a_slow_conversion_in_a_log(flags: list[str], shown: bool, tmp_path: Path) -> None:
    """The command prints lines that end at 100 %, on stderr, and with --quiet and --json none."""
    source = write_case("gptq-v1", tmp_path / "in").path
    program = (
        "import sys\nfrom convert_w4a8.cli import progress\nfrom convert_w4a8.cli.convert import convert_command\n"
        "progress._LEAST_SECONDS = 0\nconvert_command(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert bool(lines) == shown
    assert all(line.startswith("convert ") and line.endswith(" left") for line in lines)
    assert not shown or len(lines) <= 11
    assert "convert: " not in done.stderr  # the bar
