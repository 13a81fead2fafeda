"""Commands as processes: signals, streams that cannot be written to, directories that vanish, `python -m`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_edits import snapshot, write_case

import convert_w4a8
from convert_w4a8.cli.signals import Stopped, signals_interrupt

pytestmark = pytest.mark.slow

SLOW = """
import sys, time
from convert_w4a8.cli.main import main
from convert_w4a8.conversion import shard

fast, converted = shard.convert_layer, []
def slow(*arguments):
    converted.append(1)
    if len(converted) == 6:  # some are done
        print("HALFWAY", file=sys.stderr, flush=True)
    if len(converted) >= 6:
        time.sleep(0.2)
    return fast(*arguments)
shard.convert_layer = slow
main(sys.argv[1:])
"""
"""`w4a8`, but it says when it is in the middle of a conversion, and is slow from there on."""
W4A8 = "from convert_w4a8.cli.main import main; main(prog_name='w4a8')"


@pytest.fixture(autouse=True)
def _hangups_are_heard() -> Iterator[None]:
    """SIGHUP does what it does by default, here and in what is started, also where nohup runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint, beside nothing else."""
    return write_case("gptq-v1", tmp_path_factory.mktemp("process") / "in").path


def start(program: str, *arguments: object, cwd: Path, **keywords: object) -> subprocess.Popen[str]:
    """Start `w4a8` in a directory that is also the one for temporary files."""
    (cwd / "tmp").mkdir(exist_ok=True)
    environ = {**os.environ, "TMPDIR": str(cwd / "tmp")}
    for name in ("GITHUB_STEP_SUMMARY", "PYTHONUNBUFFERED"):  # with a buffer, there is something to flush at exit
        environ.pop(name, None)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environ, text=True, **streams)  # type: ignore[call-overload, no-any-return]


def run(*arguments: object, cwd: Path, **keywords: object) -> tuple[int, str, str]:
    """Run `w4a8`; return exit code, stdout and stderr."""
    with start(W4A8, *arguments, cwd=cwd, **keywords) as process:
        stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout or "", stderr or ""


def one_line(stderr: str) -> str:
    """Return the only line, after checking that it is the user's error."""
    assert stderr.startswith("Error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr


# Signals.


def interrupt_halfway(process: subprocess.Popen[str], *numbers: int) -> tuple[str, str]:
    """Send signals when the conversion is in its middle; return what it printed from there on."""
    assert process.stderr is not None
    assert process.stderr.readline() == "HALFWAY\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)
    return process.communicate(timeout=60)


@pytest.mark.parametrize("command", ["convert", "check"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_conversion_and_leaves_nothing(
    number: signal.Signals, command: str, source: Path, tmp_path: Path
) -> None:
    """One line, the exit code of the signal, and neither OUT nor a work directory nor a temporary file."""
    before = snapshot(source)
    arguments = [command, source, *([tmp_path / "out", "--quiet"] if command == "convert" else [])]
    with start(SLOW, *arguments, cwd=tmp_path) as process:
        stdout, stderr = interrupt_halfway(process, number)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert process.returncode == 128 + number
    assert (stdout, stderr) == ("", f"Interrupted{by}; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []
    assert snapshot(source) == before


def test_further_signals_do_not_break_off_the_tidying_up(source: Path, tmp_path: Path) -> None:
    """Those who send SIGTERM often send SIGHUP too, or SIGTERM again."""
    with start(SLOW, "check", source, cwd=tmp_path) as process:
        interrupt_halfway(process, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)
    assert process.returncode == 143
    assert list((tmp_path / "tmp").iterdir()) == []


def test_finished_files_are_kept_for_resume(source: Path, tmp_path: Path) -> None:
    """As after Ctrl-C: the line says so, and the same output comes of it."""
    out = tmp_path / "out"
    arguments = ["convert", source, out, "--quiet", "--max-shard-size", "300kB", "--workers", "1"]
    with start(SLOW, *arguments, cwd=tmp_path) as process:
        _, stderr = interrupt_halfway(process, signal.SIGTERM)
    assert process.returncode == 143
    assert "files are finished; --resume continues from there" in stderr
    assert not out.exists()
    assert run(*arguments, "--resume", cwd=tmp_path)[0] == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "tmp"] == ["out"]


def test_nohup_is_respected(source: Path, tmp_path: Path) -> None:
    """A SIGHUP that is ignored stays ignored."""
    program = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{SLOW}"
    with start(program, "convert", source, tmp_path / "out", "--quiet", cwd=tmp_path) as process:
        interrupt_halfway(process, signal.SIGHUP)
    assert process.returncode == 0
    assert (tmp_path / "out").is_dir()


def test_handlers_are_put_back() -> None:
    """In a program that calls us, its own handlers stay; the default comes back; other threads set none."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), signals_interrupt():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) == before
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        with signals_interrupt():
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)

    def elsewhere() -> None:
        with signals_interrupt():
            seen.append(0)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen[-1] == 0


# Standard output that cannot be written to.


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "{in}", "out"],
        ["convert", "{in}", "out", "--dry-run", "--json"],
        ["inspect", "{in}"],
        ["check", "{in}", "--sample"],
        ["env"],
        ["--help"],
        ["convert", "--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_a_full_disk_behind_stdout_is_one_line(words: list[str], source: Path, tmp_path: Path) -> None:
    """Also where Click prints; and nothing is converted when the plan could not be shown."""
    with Path("/dev/full").open("w") as full:
        code, _, stderr = run(*(word.replace("{in}", str(source)) for word in words), cwd=tmp_path, stdout=full)
    assert code == 1
    assert "standard output: cannot be written (No space left on device)" in one_line(stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["convert", "{in}", "out"], ["env", "--json"], ["--help"]], ids=" ".join)
def test_a_closed_pipe_is_quiet(words: list[str], source: Path, tmp_path: Path) -> None:
    """As for other tools in `… | head`: no line at all, the exit code of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    code, _, stderr = run(*(word.replace("{in}", str(source)) for word in words), cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (code, stderr) == (141, "")


def test_an_encoding_without_our_characters(source: Path, tmp_path: Path) -> None:
    """A terminal that knows Western Europe alone: escaped, not a traceback after the work; --help too."""
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    for words in (["convert", str(source), "out\u2192"], ["verify", "--help"]):
        command = [sys.executable, "-c", W4A8, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, encoding="latin-1", check=False)
        assert done.returncode == 0, done.stderr
        assert ("out\\u2192" if words[0] == "convert" else "\\u2212") in done.stdout


# Directories and files.


def test_a_working_directory_that_is_gone_is_one_line(source: Path, tmp_path: Path) -> None:
    """Whatever the command; `env` answers all the same."""
    program = f"import os\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')\n{W4A8}"
    for words in (["convert", source, "out"], ["convert", source, tmp_path / "out"], ["inspect", source], ["env"]):
        with start(program, *words, cwd=tmp_path) as process:
            stdout, stderr = process.communicate(timeout=60)
        if words == ["env"]:
            assert (process.returncode, stderr) == (0, "")
            assert stdout.startswith("w4a8-convert")
        else:
            assert process.returncode == 1
            assert "working directory: has been deleted" in one_line(stderr)


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["markdown", "json"])
def test_a_job_summary_that_cannot_be_written(flags: list[str], source: Path, tmp_path: Path) -> None:
    """One line and exit code 1, after the result was printed; with --json one document all the same."""
    program = f"import os\nos.environ['GITHUB_STEP_SUMMARY'] = '/proc/none/summary'\n{W4A8}"
    with start(program, "check", source, *flags, cwd=tmp_path) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "GITHUB_STEP_SUMMARY (/proc/none/summary): cannot be written" in one_line(stderr)
    if flags:
        assert json.loads(stdout)["ok"] is True
    else:
        assert stdout.startswith("## w4a8 check of `in`: passed")


def test_an_empty_name_is_no_summary(source: Path, tmp_path: Path) -> None:
    """A variable that is set to nothing is not set."""
    program = f"import os\nos.environ['GITHUB_STEP_SUMMARY'] = ''\n{W4A8}"
    with start(program, "check", source, cwd=tmp_path) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0


# python -m.


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return what plants modules in a directory, and check in the end that none of them was run."""
    place = tmp_path / "checkpoint"
    place.mkdir()

    def plant(names: str) -> Path:
        for name in names.split():
            (place / f"{name}.py").write_text(f"open({str(tmp_path / 'RUN')!r}, 'a').write({name!r})\n")
        return place

    yield plant
    assert not (tmp_path / "RUN").exists()


def module(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m convert_w4a8` in a directory."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """With its subcommands, and its name in the usage."""
    assert module(tmp_path, "-m", "convert_w4a8", "--version").stdout.strip().endswith(convert_w4a8.__version__)
    assert "python -m convert_w4a8 convert" in module(tmp_path, "-m", "convert_w4a8", "convert", "--help").stdout
    assert module(tmp_path, "-m", "convert_w4a8", "verify").returncode == 2


def test_modules_in_the_working_directory_are_not_run(trap: Callable[[str], Path], source: Path) -> None:
    """It may be a checkpoint's."""
    place = trap("click torch numpy numba yaml tqdm huggingface_hub safetensors json tempfile kernels cli")
    result = module(place, "-m", "convert_w4a8", "check", str(source), "--sample")
    assert result.returncode == 0, result.stderr


def test_with_p_not_even_those_that_python_imports_first(trap: Callable[[str], Path], source: Path) -> None:
    """As the reference says."""
    place = trap("click torch numba typing runpy importlib convert_w4a8")
    result = module(place, "-P", "-m", "convert_w4a8", "inspect", str(source))
    assert result.returncode == 0, result.stderr


def test_a_signal_keeps_its_name_where_a_library_raises_another_interrupt() -> None:
    """As Ray does; notes are kept."""

    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            other = KeyboardInterrupt()
            other.add_note("2 files are finished")
            raise other from None

    def command() -> None:
        with signals_interrupt():
            library()

    with pytest.raises(Stopped) as caught:
        command()
    assert caught.value.number == signal.SIGTERM
    assert caught.value.__notes__ == ["2 files are finished"]
