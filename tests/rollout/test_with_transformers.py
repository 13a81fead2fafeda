"""The proxy before real servers: `transformers serve` of a small model, twice, on a CPU."""

import json
from pathlib import Path

import pytest
from proxy_client import ask
from rollout_proxy import Proxy, port_of, until

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.servers import Caps, find_server, serve

pytestmark = pytest.mark.slow


def test_real_servers_stream_and_get_copies(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams arrive whole from either side; a copy is answered; going back goes back."""
    try:
        find_server("transformers")
    except ConvertError as error:
        pytest.skip(f"REAL SERVERS NOT RUN: {error}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, caps = shared / "models" / "llama-31m-bf16", Caps(None, 1, 600.0)
    request = {"prompt": "def add(a, b):\n", "stream": True, "temperature": 0}
    with (
        serve("baseline", model, "transformers", caps, print) as baseline,
        serve("candidate", model, "transformers", caps, print) as candidate,
        Proxy(tmp_path / "nginx", port_of(baseline), port_of(candidate), max_tokens=8) as proxy,
    ):

        def streamed(asked: dict[str, object]) -> list[str]:
            """Return what came, piece by piece."""
            reply = ask(proxy.port, {"model": str(model.resolve()), **asked}, "/v1/completions")
            assert reply.status == 200, reply.body
            events = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")]
            chunks = [json.loads(event) for event in events if event != "[DONE]"]
            return [choice["text"] for chunk in chunks for choice in chunk["choices"]]

        def answers() -> list[str]:
            """Return the addresses that answered, one for each request."""
            lines = (proxy.directory / "log" / "w4a8-access.log").read_text(encoding="utf-8").splitlines()
            return [json.loads(line)["upstream"] for line in lines]

        first = streamed(request | {"max_tokens": 8})
        assert len(first) > 2
        proxy.script("shadow", "100")
        assert streamed(request | {"max_tokens": None}) == first  # the cap
        lines = proxy.shadow_log
        until(lambda: lines.read_text(encoding="utf-8").count("\n") == 2, "the copy is answered")
        assert {json.loads(line)["status"] for line in lines.read_text(encoding="utf-8").splitlines()} == {"200"}
        proxy.script("canary", "100")
        assert streamed(request | {"max_tokens": 8}) == first
        proxy.script("back")
        assert streamed(request | {"max_tokens": 8}) == first
        sides = [f"127.0.0.1:{port}" for port in (proxy.baseline, proxy.candidate)]
        until(lambda: len(answers()) == 4, "requests are logged")
        assert answers() == [sides[0], sides[0], sides[1], sides[0]]
