"""Servers that an evaluation starts for a directory, waits for, and always stops."""

import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from urllib.parse import urlsplit

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.answer import Side
from convert_w4a8.text import printable

_STOP_SECONDS = 20.0
"""What a server has to end by itself."""
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_GONE_SECONDS = 5.0
"""What killed processes have to be gone."""
_SERVING = ("fastapi", "uvicorn", "openai", "accelerate")
"""What `transformers serve` needs, beside the package."""


@dataclass(frozen=True)
class Caps:
    """What both servers are started with.

    max_model_len: tokens of a sequence, for vLLM. seconds: to wait for one. options: more of the command line.
    """

    max_model_len: int | None
    concurrency: int
    seconds: float
    options: tuple[str, ...] = ()


def is_url(place: str) -> bool:
    """Whether a server is meant that runs already."""
    return place.startswith(("http://", "https://"))


def check_url(side: str, url: str) -> None:
    """Raise ConvertError for what is no URL of a server, or one that reports must not show."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        named = False
    if not named:
        raise ConvertError(f"--{side}", "is no URL of a server", "give http://HOST:PORT")
    if "@" in parts.netloc or parts.query or parts.fragment:
        reason = "has a password or a query, which reports would show"
        raise ConvertError(f"--{side}", reason, "leave it out, and give the server's key in OPENAI_API_KEY")


def find_server(wanted: str) -> str:
    """Return "vllm" or "transformers". Raises ConvertError where it is not installed."""
    if wanted in ("auto", "vllm") and _program("vllm"):
        return "vllm"
    if wanted == "vllm":
        raise ConvertError("--server vllm", "vLLM is not installed here", "install it, or give the URL of a server")
    missing = [name for name in ("transformers", *_SERVING) if importlib.util.find_spec(name) is None]
    if missing or not _program("transformers"):
        what = f"{missing[0]} is" if missing else "the command transformers is"
        before = "vLLM is not installed here, and " if wanted == "auto" else ""
        remedy = "pip install 'transformers[serving]', or give the URL of a server"
        raise ConvertError("w4a8 evaluate", f"{before}{what} missing for transformers serve", remedy)
    return "transformers"


def check_directory(side: Side, place: str) -> Path:
    """Return the directory to serve. Raises ConvertError where there is no model."""
    path = Path(place)
    if not path.is_dir():
        raise ConvertError(
            f"--{side} {place}", "is neither a URL nor a directory", "give http://HOST:PORT, or a checkpoint"
        )
    config = path / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(str(config), f"cannot be read ({error})", f"name a checkpoint with --{side}") from error
    settings = found.get("quantization_config") if isinstance(found, dict) else None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "w4a8_lut" and not _program("vllm"):
        raise ConvertError(
            str(path), "is in the lut format, which transformers cannot serve", "serve it with vLLM and give its URL"
        )
    return path


@contextmanager
def serve(side: Side, directory: Path, server: str, caps: Caps, say: Callable[[str], None]) -> Iterator[str]:
    """Serve a directory within the block; yields the URL.

    Raises ConvertError where the server ends or does not answer in time, with the last lines that it wrote.
    """
    port = _free_port()
    command = _command(directory, server, port, caps)
    say(f"starting   {side}: {server} serve {directory}")
    with TemporaryFile() as log, _process(command, log) as process:
        _wait(side, process, port, caps.seconds, log)
        yield f"http://127.0.0.1:{port}"


def _command(directory: Path, server: str, port: int, caps: Caps) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if server == "vllm":
        length = [] if caps.max_model_len is None else ["--max-model-len", str(caps.max_model_len)]
        return [
            _program("vllm"),
            "serve",
            str(directory.resolve()),
            *where,
            "--max-num-seqs",
            str(max(caps.concurrency, 8)),
            *length,
            *caps.options,
        ]
    return [_program("transformers"), "serve", str(directory.resolve()), *where, *caps.options]


def _program(name: str) -> str:
    """Return the path of a command: beside this interpreter, else on the path; or nothing."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name) or ""


@contextmanager
def _process(command: list[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a group of its own, and end all of the group afterwards, whatever happens."""
    process = subprocess.Popen(  # noqa: S603 - a program that was looked up, with our arguments
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also where Ctrl-C interrupts the waiting; and what outlives the first process of the group
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + _GONE_SECONDS
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < until:  # its memory on the GPU is free when the last process is gone
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def _wait(side: Side, process: subprocess.Popen[bytes], port: int, seconds: float, log: IO[bytes]) -> None:
    """Wait until a server is healthy."""
    until = time.monotonic() + seconds
    while not _healthy(port):
        if process.poll() is not None:
            raise ConvertError(
                f"{side} server", f"ended with code {process.returncode}: {_tail(log)}", "mend that, or give its URL"
            )
        if time.monotonic() > until:
            raise ConvertError(
                f"{side} server", f"was not ready after {seconds:g} s: {_tail(log)}", "raise --start-timeout"
            )
        time.sleep(0.25)


def _healthy(port: int) -> bool:
    try:
        with _WITHOUT_PROXY.open(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _tail(log: IO[bytes]) -> str:
    """Return what a server said last."""
    size = os.fstat(log.fileno()).st_size
    end = os.pread(log.fileno(), 4000, max(0, size - 4000))  # the server's place in the file stays where it is
    lines = [line.strip() for line in end.decode(errors="replace").splitlines() if line.strip()]
    return printable(" / ".join(lines[-3:]) or "it said nothing")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
