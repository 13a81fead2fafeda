"""Rules, their tests and the dashboard of docs/guides/rollout: with promtool, Prometheus, and vLLM's sources."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from rollout_proxy import KIT, free_port, tool, until
from vllm_sources import VERSIONS, sources

FOLDER = KIT / "prometheus"
RULES = yaml.safe_load((FOLDER / "w4a8.rules.yml").read_text(encoding="utf-8"))
RECORDED = {rule["record"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
ALERTS = {rule["alert"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
DASHBOARD = json.loads((KIT / "grafana" / "w4a8.json").read_text(encoding="utf-8"))
SHOWN = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
OF_PROMETHEUS = {"up", "ALERTS"}
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def promtool(*arguments: str) -> str:
    """Run it in the folder; return what it says, whatever the exit code."""
    command = [tool("promtool"), *arguments]
    result = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    return f"{result.returncode}: {result.stdout}{result.stderr}"


def names(expression: str) -> set[str]:
    """Return the metrics of an expression: identifiers but for labels, functions and the words of PromQL."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|ignoring) \([^)]*\)", "", expression)
    found = set(re.findall(r"[A-Za-z_:][\w:]*\b(?!\()", bare))
    return found - {"and", "or", "unless", "by", "on", "ignoring", "sum", "max"}


def test_names() -> None:
    """The helper of these tests finds them all."""
    assert names('sum by (side) (rate(vllm:a_total{b="c"}[5m])) / ignoring (side) up > 0.5 or on () vector(0)') == {
        "vllm:a_total",
        "up",
    }


def test_promtool_takes_rules_and_configuration() -> None:
    """And has nothing to say against them."""
    assert promtool("check", "rules", "--lint=all", "--lint-fatal", "w4a8.rules.yml").startswith("0: ")
    assert promtool("check", "config", "prometheus.yml").startswith("0: ")


def test_rules_do_what_their_tests_say() -> None:
    """Each alert fires and does not, each recorded value is as it was worked out."""
    assert promtool("test", "rules", "w4a8.test.yml").startswith("0: ")


@pytest.mark.parametrize(
    ("kind", "off"),
    [("record", "vector(1)"), ("alert", "vector(1)"), ("alert", "vector(1) > 2")],
    ids=["recorded values", "alerts that hold always", "alerts that never hold"],
)
def test_a_rule_that_is_off_is_found(tmp_path: Path, kind: str, off: str) -> None:
    """The tests of the rules can fail, for each of the rules."""
    groups = [
        group | {"rules": [rule | ({"expr": off, "for": "0s"} if kind in rule else {}) for rule in group["rules"]]}
        for group in RULES["groups"]
    ]
    for rule in (rule for group in groups for rule in group["rules"] if "record" in rule):
        rule.pop("for", None)
    (tmp_path / "w4a8.rules.yml").write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
    shutil.copy(FOLDER / "w4a8.test.yml", tmp_path)
    said = promtool("test", "rules", str(tmp_path / "w4a8.test.yml"))
    assert [name for name in (RECORDED if kind == "record" else ALERTS) if name not in said] == []


def test_every_rule_is_tested() -> None:
    """Alerts both ways."""
    tests = yaml.safe_load((FOLDER / "w4a8.test.yml").read_text(encoding="utf-8"))["tests"]
    asked = [(case["alertname"], bool(case.get("exp_alerts"))) for test in tests for case in test["alert_rule_test"]]
    assert set(asked) == {(alert, fires) for alert in ALERTS for fires in (True, False)}
    evaluated = set().union(*(names(case["expr"]) for test in tests for case in test.get("promql_expr_test", [])))
    assert evaluated == set(RECORDED)


def metrics_of(version: str) -> dict[str, str]:
    """Return name → kind of the metrics that vLLM's engine defines, with the suffixes that they get in /metrics."""
    found: dict[str, str] = {}
    tree = ast.parse((sources(version) / "vllm" / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            kind = re.fullmatch(r"_(counter|gauge|histogram)_cls", node.func.attr)
            name = next((word.value for word in node.keywords if word.arg == "name"), None)
            if kind and isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.update({f"{name.value}{suffix}": kind[1] for suffix in SUFFIXES[kind[1]]})
    assert found
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_vllm_has_every_metric(version: str) -> None:
    """Of this kind and with these labels; requests are counted by the package that vLLM takes for it."""
    defined = metrics_of(version)
    used = set().union(*map(names, [*RECORDED.values(), *ALERTS.values()])) - set(RECORDED) - OF_PROMETHEUS
    assert {name for name in used if name.startswith("vllm:")} <= set(defined)
    assert {name for name in used if not name.startswith("vllm:")} == {"http_requests_total"}
    root = sources(version) / "vllm"
    instrumented = (root / "entrypoints/serve/instrumentator/metrics.py").read_text(encoding="utf-8")
    assert "from prometheus_fastapi_instrumentator import Instrumentator" in instrumented
    assert "should_group_status_codes=False" not in instrumented  # so a status is "5xx"
    for expression in [*RECORDED.values(), *ALERTS.values()]:
        for name, kind in defined.items():
            if kind != "histogram":
                assert not re.search(rf"(rate|increase)\({name}\b", expression) or kind == "counter"
    routers = "".join(file.read_text("utf-8") for file in (root / "entrypoints").rglob("api_router.py"))
    for handlers in re.findall(r'handler=~"/v1/\(([^)]*)\)"', " ".join(RECORDED.values())):
        assert [path for path in handlers.split("|") if f'"/v1/{path}"' not in routers] == []
    reasons = re.search(r"FINISH_REASON_STRINGS = \(([^)]*)\)", (root / "v1/engine/__init__.py").read_text("utf-8"))
    assert reasons
    for values in re.findall(r'finished_reason=~?"([^"]*)"', " ".join([*RECORDED.values(), *ALERTS.values()])):
        assert set(values.split("|")) <= set(re.findall(r'"(\w+)"', reasons[1]))
    labels = re.search(r"labelnames = (\[[^\]]*\])", (root / "v1/metrics/loggers.py").read_text("utf-8"))
    assert labels
    assert "side" not in labels[1]  # it is ours alone


def test_the_dashboard_shows_what_is_recorded(tmp_path: Path) -> None:
    """All of it; its expressions are PromQL; panels do not overlap, and fit."""
    assert set().union(*map(names, SHOWN)) == set(RECORDED) | OF_PROMETHEUS
    rules = [{"record": f"shown{number}", "expr": expression} for number, expression in enumerate(SHOWN)]
    (tmp_path / "shown.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}), encoding="utf-8"
    )
    assert promtool("check", "rules", str(tmp_path / "shown.yml")).startswith("0: ")
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
    assert taken == {(x, y) for x in range(24) for y in range(max(y for _, y in taken) + 1)}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["source"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_dashboard_has_grafanas_shape() -> None:
    """Its own types of a dashboard keep every key of it, and know every unit."""
    models = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard",
        reason="pip install grafana-foundation-sdk, to check the dashboard with",
    )
    units = importlib.import_module("grafana_foundation_sdk.models.units")
    importlib.import_module("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    encoder = importlib.import_module("grafana_foundation_sdk.cog.encoder").JSONEncoder()
    read = json.loads(encoder.encode(models.Dashboard.from_json(DASHBOARD)))

    def lost(mine: Any, theirs: Any) -> Iterator[Any]:
        if isinstance(mine, dict):
            for key, value in mine.items():
                yield from [key] if key not in theirs else lost(value, theirs[key])
        elif isinstance(mine, list):
            assert len(mine) == len(theirs)
            for pair in zip(mine, theirs, strict=True):
                yield from lost(*pair)
        elif mine != theirs:
            yield mine

    assert list(lost(DASHBOARD, read)) == []
    for panel in DASHBOARD["panels"]:
        assert panel["fieldConfig"]["defaults"].get("unit", "short") in vars(units).values()


def exposition(metrics: dict[str, str], seconds: float) -> str:
    """Return what a vLLM with these metrics says in /metrics that has had one request a second for so long."""
    lines = []
    for name, kind in metrics.items():
        labels = 'model_name="m",engine="0"'
        value = seconds if kind != "gauge" else 0.5
        if name == "vllm:request_success_total":  # with all reasons, from the start
            lines.append(f'{name}{{{labels},finished_reason="stop"}} {value}')
            lines += [
                f'{name}{{{labels},finished_reason="{reason}"}} 0' for reason in ("length", "error", "repetition")
            ]
        elif name.endswith("_bucket"):
            lines += [f'{name}{{{labels},le="{le}"}} {value}' for le in ("0.1", "+Inf")]
        else:
            lines.append(f"{name}{{{labels}}} {value}")
    lines.append(f'http_requests_total{{handler="/v1/completions",method="POST",status="2xx"}} {seconds}')
    return "\n".join(lines) + "\n"


@contextmanager
def metrics_server(version: str) -> Iterator[int]:
    """Serve all that a version defines within the block; yields the port."""
    metrics, started = metrics_of(version), time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(exposition(metrics, time.monotonic() - started).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_prometheus_has_what_the_dashboard_shows(tmp_path: Path) -> None:
    """Scraped from two servers with the guide's configuration; a value for each side, and no alert."""
    program = tool("prometheus")
    shutil.copy(FOLDER / "w4a8.rules.yml", tmp_path)
    port = free_port()
    with metrics_server(VERSIONS[0]) as baseline, metrics_server(VERSIONS[1]) as candidate:
        text = (FOLDER / "prometheus.yml").read_text(encoding="utf-8").replace("15s", "500ms")
        text = text.replace("127.0.0.1:8001", f"127.0.0.1:{baseline}").replace(
            "127.0.0.1:8002", f"127.0.0.1:{candidate}"
        )
        (tmp_path / "prometheus.yml").write_text(text, encoding="utf-8")
        options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([program, *options], cwd=tmp_path, stdout=log, stderr=log)
        try:

            def sides(expression: str) -> set[str]:
                url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
                try:
                    with urllib.request.urlopen(url, timeout=10) as response:
                        result = json.load(response)["data"]["result"]
                except OSError:
                    assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
                    return set()
                return {found["metric"].get("side", "") for found in result if found["value"][1] != "NaN"}

            for expression in SHOWN:
                if "ALERTS" not in expression:
                    until(lambda shown=expression: sides(shown) == {"baseline", "candidate"}, expression)  # type: ignore[misc]
            (alerts,) = (expression for expression in SHOWN if "ALERTS" in expression)
            assert sides(alerts) == set()
        finally:
            process.terminate()
            process.wait(60)
