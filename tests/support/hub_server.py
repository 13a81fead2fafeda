"""A Hub on this machine: what uploads through plain LFS and downloads in parts use, with faults on demand.

What it answers follows the requests that huggingface_hub makes (`_commit_api.py`, `lfs.py`); uploads must come with
`Authorization: Bearer TOKEN`. Xet, the Hub's newer storage, is not spoken here: HF_HUB_DISABLE_XET turns it off.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.utils._http as hub_http
import pytest

TOKEN = "hf_thisIsASecretThatMustNotLeak"
DROP = 0
"""As the status of a fault: close the connection in the middle of the request."""

Blob = tuple[str, bytes]
"""How a file is stored, lfs or regular, and its content."""


@dataclass
class Repo:
    """A model repository: branch → path → file."""

    private: bool
    branches: dict[str, dict[str, Blob]] = field(default_factory=lambda: {"main": {".gitattributes": ("regular", b"")}})
    commits: list[tuple[str, str]] = field(default_factory=list)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """Return the content of a branch."""
        return {path: content for path, (_, content) in self.branches[branch].items()}


@dataclass
class Hub:
    """State that tests look at and change.

    faults: (pattern of "METHOD path", status); the first that matches is answered instead of the truth.
    requests: "METHOD path" of all that came. sent: bytes of files that were downloaded.
    ranges: whether requests for parts of a file are heeded.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    ranges: bool = True

    def uploads(self) -> list[str]:
        """Return the SHA-256 of the objects that were sent, in order."""
        return [request.rpartition("/")[2] for request in self.requests if request.startswith("PUT ")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = next((status for pattern, status in self.hub.faults if re.search(pattern, request)), None)
        if fault == DROP:
            self.close_connection = True
            return
        body = self._body()
        if fault is not None:
            self._answer(fault, {"error": f"fault {fault} for {self.headers.get('Authorization')}"})
        elif self.command == "PUT":  # as at a storage provider: the address is the permission
            self.hub.objects[path.rpartition("/")[2]] = body
            self._answer(200, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self._answer(*self._route(request, body))

    do_GET = do_POST = do_PUT = _handle  # noqa: N815 (names of BaseHTTPRequestHandler)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, document: object) -> None:
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", self._content_range)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _route(self, request: str, body: bytes) -> tuple[int, object]:
        routes: tuple[tuple[str, Callable[..., tuple[int, object]]], ...] = (
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda _: (200, {"errors": [], "warnings": []})),
            (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", self._branch),
            (r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<branch>.+)", self._tree),
            (r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<branch>.+))?", self._info),
            (r"GET /(?P<repo>[^/]+/[^/]+)/resolve/(?P<branch>[^/]+)/(?P<path>.+)", self._resolve),
            (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<branch>.+)", self._preupload),
            (r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<branch>.+)", self._commit),
        )
        for pattern, handler in routes:
            match = re.fullmatch(pattern, request)
            if match:
                names = match.groupdict()
                if "repo" in names and names["repo"] not in self.hub.repos:
                    return 404, {"error": "Repository not found"}
                branch = names.get("branch")
                if branch and handler != self._branch and branch not in self.hub.repos[names["repo"]].branches:
                    return 404, {"error": "Invalid rev id"}
                answer: tuple[int, object] = handler(body, **names) if names else handler(body)
                return answer
        return 501, {"error": f"{request} is not part of this Hub"}

    def _create(self, body: bytes) -> tuple[int, object]:
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repos:
            return 409, answer | {"error": "You already created this model repo"}
        self.hub.repos[repo] = Repo(wanted.get("private") is True or wanted.get("visibility") == "private")
        return 200, answer

    def _branch(self, _: bytes, repo: str, branch: str) -> tuple[int, object]:
        branches = self.hub.repos[repo].branches
        if branch in branches:
            return 409, {"error": "Reference already exists"}
        branches[branch] = dict(branches["main"])
        return 200, {}

    def _tree(self, _: bytes, repo: str, branch: str) -> tuple[int, object]:
        files = self.hub.repos[repo].files(branch)
        return 200, [
            {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            for path, content in files.items()
        ]

    def _info(self, _: bytes, repo: str, branch: str | None) -> tuple[int, object]:
        commits = len(self.hub.repos[repo].commits)
        return 200, {"id": repo, "sha": branch or "main", "siblings": [], "commits": commits}

    def _resolve(self, _: bytes, repo: str, branch: str, path: str) -> tuple[int, object]:
        content = self.hub.repos[repo].files(branch).get(path)
        if content is None:
            return 404, {"error": "Entry not found"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None or not self.hub.ranges:
            self.hub.sent += len(content)
            return 200, content
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        self.hub.sent += stop - start
        self._content_range = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, content[start:stop]

    def _preupload(self, body: bytes, repo: str, branch: str) -> tuple[int, object]:
        present = self.hub.repos[repo].branches[branch]
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
            oid = _oid(present[path]) if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}

    def _lfs_batch(self, body: bytes, repo: str) -> tuple[int, object]:
        answers: list[dict[str, Any]] = []
        for item in json.loads(body)["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{repo}/{item['oid']}"}}
            answers.append(answer)
        return 200, {"transfer": "basic", "objects": answers}

    def _commit(self, body: bytes, repo: str, branch: str) -> tuple[int, object]:
        target = self.hub.repos[repo]
        files = dict(target.branches[branch])
        title = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = ("regular", base64.b64decode(value["content"]))
                case "lfsFile":
                    content = self.hub.objects.get(value["oid"])
                    if content is None or hashlib.sha256(content).hexdigest() != value["oid"]:
                        return 400, {"error": f"{value['path']}: the object was never uploaded"}
                    files[value["path"]] = ("lfs", content)
                case key:
                    return 400, {"error": f"{key} is not expected"}
        target.branches[branch] = files
        target.commits.append((branch, title))
        oid = f"{len(target.commits):040x}"
        return 200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def _oid(blob: Blob) -> str:
    """Return what the Hub calls a file's oid: SHA-256 of an LFS object, git's hash of a regular file."""
    mode, content = blob
    return hashlib.sha256(content).hexdigest() if mode == "lfs" else _git_oid(content)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub on a free port of 127.0.0.1 while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lead_client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead huggingface_hub to this Hub, with a token, without Xet; its retries follow at once."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda _seconds: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
