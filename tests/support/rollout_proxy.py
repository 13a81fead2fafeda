"""The nginx of docs/guides/rollout, started without root before two servers, with its own directory and ports."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Self

import pytest
from paths import ROOT

KIT = ROOT / "docs" / "guides" / "rollout"
TOOLS = Path(os.environ.get("W4A8_ROLLOUT_TOOLS", Path.home() / ".cache" / "w4a8-convert" / "rollout")).resolve()
"""Where scripts/fetch_rollout_tools.sh unpacks them."""
_HOW = "run scripts/fetch_rollout_tools.sh, or apt-get install nginx libnginx-mod-http-js prometheus"
_SECONDS = 60.0
"""Until something must have happened. A busy machine takes long; nothing waits that long where all is well."""


def tool(name: str) -> str:
    """Return the path of a program of these packages; skip the test where it is not to be had."""
    places = [str(TOOLS / "usr" / "sbin" / name), str(TOOLS / "usr" / "bin" / name), shutil.which(name)]
    found = next((place for place in places if place is not None and _runs(place)), None)
    if found is None:
        pytest.skip(f"ROLLOUT NOT TESTED: no {name} that runs is here; {_HOW}")
    return found


@cache
def _runs(program: str) -> bool:
    """Whether it is there and says its version: what was only unpacked may lack shared libraries."""
    option = "-v" if program.endswith("nginx") else "--version"
    try:
        return subprocess.run([program, option], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def javascript() -> Path:
    """Return nginx's JavaScript module; skip the test where it is not to be had."""
    name = Path("usr/lib/nginx/modules/ngx_http_js_module.so")
    for root in (TOOLS, Path("/")):
        if (root / name).is_file():
            return root / name
    pytest.skip(f"ROLLOUT NOT TESTED: nginx has no JavaScript module here; {_HOW}")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def port_of(url: str) -> int:
    """Return the port of a server's URL."""
    return int(url.rpartition(":")[2])


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something; fail with what it was."""
    end = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {_SECONDS:.0f} s: {what}")
        time.sleep(0.01)


@dataclass
class Proxy:
    """nginx with the files of the guide, but for paths and ports. baseline, candidate: ports of the servers.

    user: as whom its workers run, if root starts it.
    """

    directory: Path
    baseline: int
    candidate: int
    max_tokens: int = 2048
    user: str = "root root"
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> Path:
        """What is /etc/nginx/w4a8 elsewhere."""
        return self.directory / "etc" / "w4a8"

    @property
    def shadow_log(self) -> Path:
        """What `w4a8 evaluate --logs` reads."""
        return self.directory / "log" / "w4a8-shadow.log"

    def environment(self) -> dict[str, str]:
        """Return the variables with which rollout.sh finds this nginx."""
        return {"W4A8_ROLLOUT": str(self.settings), "NGINX_COMMAND": " ".join(self.command())}

    def command(self) -> list[str]:
        """Return how it is called."""
        return [tool("nginx"), "-p", str(self.directory), "-c", "etc/nginx.conf", "-e", "log/error.log"]

    def write(self) -> None:
        """Write the configuration of nginx itself, which takes in what is in conf.d."""
        for name in ("log", "etc/conf.d"):
            (self.directory / name).mkdir(parents=True)
        temporary = "\n".join(f"{kind}_temp_path {self.directory}/{kind};" for kind in _BODIES)
        user = f"user {self.user};\n" if os.geteuid() == 0 else ""
        (self.directory / "etc" / "nginx.conf").write_text(
            f"load_module {javascript()};\n{user}pid {self.directory}/nginx.pid;\nworker_processes 2;\n"
            f"events {{ worker_connections 2048; }}\n"
            f"http {{\n{temporary}\ninclude {self.directory}/etc/conf.d/*.conf;\n}}\n",
            encoding="utf-8",
        )

    def edit(self) -> None:
        """Put our paths and ports into the files of the guide, which lie in `etc`."""
        here = {
            "/etc/nginx/w4a8": str(self.settings),
            "/var/log/nginx": str(self.directory / "log"),
            "127.0.0.1:8001": f"127.0.0.1:{self.baseline}",
            "127.0.0.1:8002": f"127.0.0.1:{self.candidate}",
            "127.0.0.1:8079": f"127.0.0.1:{free_port()}",
            "listen 8080": f"listen 127.0.0.1:{self.port}",
            "default 2048": f"default {self.max_tokens}",
            "fail_timeout=10s": "fail_timeout=1s",
            "_timeout 500ms": "_timeout 30s",  # of the hand-over of a copy: a busy machine must not lose one
        }
        found: set[str] = set()

        def edited(match: re.Match[str]) -> str:
            found.add(match[0])
            return here[match[0]]

        for file in [*(self.directory / "etc" / "conf.d").iterdir(), *self.settings.glob("*.conf")]:
            text = file.read_text(encoding="utf-8")
            file.write_text(re.sub("|".join(map(re.escape, here)), edited, text), encoding="utf-8")
        assert found == set(here), "the files of the guide have all that is edited"

    def start(self, answers: Callable[[], bool]) -> None:
        """Start nginx, and wait for something that it then does."""
        self._process = subprocess.Popen([*self.command(), "-g", "daemon off;"])

        def started() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                pytest.fail((self.directory / "log" / "error.log").read_text(encoding="utf-8"))
            return answers()

        until(started, "nginx runs")

    def __enter__(self) -> Self:
        """Start with the files of the guide, and with its flag; wait until it answers."""
        self.write()
        shutil.copytree(KIT / "nginx", self.directory / "etc", dirs_exist_ok=True)
        self.edit()
        (self.settings / "go").touch()
        self.start(self.listens)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(_SECONDS)

    def listens(self) -> bool:
        """Whether it takes connections of clients."""
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def workers(self) -> set[str]:
        """Return the process ids of its workers but for those that only finish what they began before a reload."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text(encoding="utf-8")
        titles = {child: Path(f"/proc/{child}/cmdline") for child in children.split()}
        with suppress(FileNotFoundError, ProcessLookupError):  # one that ends now
            return {child for child, title in titles.items() if b"shutting down" not in title.read_bytes()}
        return self.workers()

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run rollout.sh; where it reloads nginx, wait until the new workers have taken over."""
        until(lambda: len(self.workers()) == 2, "workers")
        before = self.workers()
        result = subprocess.run(
            [str(KIT / "rollout.sh"), *arguments],
            env=os.environ | self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode == 0 and arguments[0] in {"shadow", "canary"}:
            until(lambda: len(self.workers()) == 2 and not self.workers() & before, "new workers")
        return result


_BODIES = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
