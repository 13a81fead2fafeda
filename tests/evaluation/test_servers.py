"""Servers that are started for a directory: waited for, and always stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation import servers
from convert_w4a8.evaluation.servers import Caps, check_directory, find_server, serve

PROGRAM = """#!{python}
import http.server, json, os, subprocess, sys, time
with open({log!r}, "a") as log:
    log.write(json.dumps([os.getpid(), sys.argv[1:]]) + "\\n")
mode = open({mode!r}).read()
if mode == "dies":
    sys.exit("CUDA out of memory")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({log!r}, "a") as log:
    log.write(json.dumps([child.pid, []]) + "\\n")
if mode == "deaf":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "slow" else 200); self.end_headers()
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
CAPS = Caps(512, 4, 60)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a program called vllm on the path, and return how to say what it does and what it noted."""
    log, mode, program = tmp_path / "log", tmp_path / "mode", tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, log=str(log), mode=str(mode)))
    program.chmod(0o755)
    mode.write_text("works")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(servers, "_STOP_SECONDS", 1.0)

    class Fake:
        def set(self, what: str) -> None:
            mode.write_text(what)

        def noted(self) -> list[Any]:
            return [json.loads(line) for line in log.read_text().splitlines()]

        def alive(self) -> list[int]:
            return [pid for pid, _ in self.noted() if _runs(pid)]

    return Fake()


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make what looks like a checkpoint."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_it_is_started_with_the_caps_and_stopped(fake: Any, model: Path) -> None:
    """With all of its processes."""
    assert find_server("auto") == "vllm"
    with serve("baseline", model, "vllm", CAPS, lambda _line: None) as url:
        assert url.startswith("http://127.0.0.1:")
        arguments = fake.noted()[0][1]
        assert arguments[:2] == ["serve", str(model)]
        assert arguments[arguments.index("--max-model-len") + 1] == "512"
        assert len(fake.alive()) == 2
    assert fake.alive() == []


def test_it_is_stopped_when_the_block_fails(fake: Any, model: Path) -> None:
    """Also where it does not listen to SIGTERM."""
    fake.set("deaf")
    with pytest.raises(KeyboardInterrupt), serve("baseline", model, "vllm", CAPS, lambda _line: None):
        raise KeyboardInterrupt
    assert fake.alive() == []


@pytest.mark.parametrize(
    ("mode", "reason"), [("dies", "ended with code 1: CUDA out of memory"), ("slow", "was not ready after 2 s")]
)
def test_one_that_does_not_start(fake: Any, model: Path, mode: str, reason: str) -> None:
    """Is named, with what it said, and not left behind."""
    fake.set(mode)
    with (
        pytest.raises(ConvertError, match=reason),
        serve("candidate", model, "vllm", Caps(None, 1, 2), lambda _line: None),
    ):
        pass
    assert fake.alive() == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it(fake: Any, model: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """In the whole command, while it waits for a server."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    fake.set("slow")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    command = [sys.executable, "-m", "convert_w4a8", "evaluate", "--baseline", str(model), "--candidate", str(model)]
    command += ["--prompts", str(prompts), "--server", "vllm"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    until = time.monotonic() + 120
    while not (tmp_path / "log").exists() or len(fake.noted()) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert re.search("Interrupted.*; no answers are kept", errors)
    assert fake.alive() == []


def test_what_cannot_be_served_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No directory, no model, a format that the server does not know, a server that is not installed."""
    monkeypatch.setattr(servers, "_program", lambda _name: "")
    with pytest.raises(ConvertError, match="is neither a URL nor a directory"):
        check_directory("baseline", "localhost:8000")
    with pytest.raises(ConvertError, match=r"config\.json: cannot be read"):
        check_directory("baseline", str(tmp_path))
    (model / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "w4a8_lut"}}))
    with pytest.raises(ConvertError, match="is in the lut format"):
        check_directory("candidate", str(model))
    (model / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConvertError, match=r"config\.json: cannot be read"):
        check_directory("candidate", str(model))
    with pytest.raises(ConvertError, match="vLLM is not installed here"):
        find_server("vllm")
    with pytest.raises(ConvertError, match="missing for transformers serve"):
        find_server("auto")
