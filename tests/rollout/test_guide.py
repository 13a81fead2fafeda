"""The page walks from a conversion to all of the traffic: its commands run, in their order; what it says exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chat_server import Behaviour, chat_server
from checkpoint_edits import write_case
from paths import ROOT
from proxy_client import ask
from rollout_proxy import KIT, Proxy, port_of, tool, until
from vllm_sources import VERSIONS, sources

from convert_w4a8.cli.main import main

PAGE = (KIT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (\S.*)$", PAGE, re.MULTILINE)
LEFT_OUT = ("vllm serve ", "sudo apt-get ", "sudo systemctl ")
"""They need a GPU, or change the machine."""


def ask_until_logged(proxy: Proxy, question: str, lines: int) -> None:
    """Ask as users do, until the shadow log has so many lines."""

    def logged() -> bool:
        ask(proxy.port, {"messages": [{"role": "user", "content": question}], "stream": True})
        return proxy.shadow_log.read_bytes().count(b"\n") >= lines

    until(logged, "copies of what users ask")


def rotate(proxy: Proxy) -> None:
    """Do what Debian's logrotate does to the shadow log at midnight."""
    log = proxy.shadow_log
    log.rename(log.with_name(f"{log.name}.1"))
    log.touch(0o640)
    subprocess.run([*proxy.command(), "-s", "reopen"], check=True)


def write_programs(directory: Path, proxy: Proxy) -> None:
    """Write what the page calls: `bin` has what is on a user's path, `sbin` what is on that of sudo.

    As Debian's, sudo passes on no variables, and has a path of its own. W4A8_ROLLOUT stands in for /etc/nginx/w4a8.
    """
    module = "from convert_w4a8.cli.{} as command; command()"
    python = f"{sys.executable} -c"
    path = f"{directory / 'sbin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    programs = {
        "bin/sudo": f'exec env -i PATH={path} W4A8_ROLLOUT={proxy.settings} "$@"',
        "sbin/nginx": f'exec {" ".join(proxy.command())} "$@"',
        "bin/promtool": f'exec {tool("promtool")} "$@"',
        "bin/w4a8": f'exec {python} "{module.format("main import main")}" "$@"',
        "bin/w4a8-convert": f'exec {python} "{module.format("convert import convert_command")}" "$@"',
    }
    for name, text in programs.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (directory / name).chmod(0o755)


def modes(directory: Path) -> dict[str, int]:
    """Return the permissions of the shadow log and what is left of it."""
    return {path.name: path.stat().st_mode & 0o777 for path in directory.glob("w4a8-shadow.log*")}


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    """In a directory with a small checkpoint, before two small servers, with an nginx that did nothing until then."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    if shutil.which("curl") is None:
        pytest.skip("ROLLOUT NOT TESTED: there is no curl here; apt-get install curl")
    write_case("awq-zero-points", tmp_path / "SOURCE")
    shutil.copy(ROOT / "docs" / "examples" / "prompts.jsonl", tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "prometheus").mkdir()
    said: dict[str, str] = {}
    with chat_server(Behaviour()) as baseline, chat_server(Behaviour()) as candidate:
        proxy = Proxy(tmp_path / "nginx", port_of(baseline), port_of(candidate))
        write_programs(tmp_path / "programs", proxy)
        proxy.write()
        proxy.start((proxy.directory / "nginx.pid").is_file)
        here = {
            "/etc/nginx": str(proxy.directory / "etc"),
            "/var/log/nginx": str(proxy.directory / "log"),
            "/etc/prometheus": str(tmp_path / "prometheus"),
            "127.0.0.1:8001": f"127.0.0.1:{proxy.baseline}",
            "127.0.0.1:8002": f"127.0.0.1:{proxy.candidate}",
            "127.0.0.1:8080": f"127.0.0.1:{proxy.port}",
        }
        variables = os.environ | {
            "PATH": f"{tmp_path / 'programs' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OPENAI_API_KEY": "none",
        }
        variables.pop("GITHUB_STEP_SUMMARY", None)
        try:
            for command in COMMANDS:
                if command.startswith(LEFT_OUT):
                    continue
                if command.endswith("shadow 0"):  # a day later
                    ask_until_logged(proxy, "What is 2 + 2?", 8)
                    rotate(proxy)
                    ask_until_logged(proxy, "What is 3 + 3?", 8)
                line = re.sub("|".join(map(re.escape, here)), lambda match: here[match[0]], command)
                done = subprocess.run(
                    ["bash", "-c", line], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
                )
                verdicts = {3, 4} if " evaluate " in command else set()
                assert done.returncode in {0, *verdicts}, f"{line}\n{done.stdout}{done.stderr}"
                said[command] = done.stdout
                if command.startswith("sudo cp -r"):
                    proxy.edit()  # what the page says then
        finally:
            proxy.__exit__()
    scripts = [(command.partition("rollout.sh ")[2], text) for command, text in said.items() if "rollout.sh" in command]
    assert [words for words, _ in scripts][:3] == ["forward", "shadow 10", "shadow 100"]
    assert [words for words, _ in scripts][-3:] == ["canary 100", "status", "back"]
    assert dict(scripts)["status"] == "canary 100 %, shadow 0 %\n"
    assert "ROLLED BACK" in dict(scripts)["back"]
    assert any('"object": "list"' in text for command, text in said.items() if command.startswith("curl"))
    page = (tmp_path / "shadow" / "evaluation.html").read_text(encoding="utf-8")
    assert "What is 2 + 2?" in page  # of the day before
    assert "What is 3 + 3?" in page
    assert modes(proxy.shadow_log.parent) == {"w4a8-shadow.log": 0o640}
    assert (tmp_path / "shadow").stat().st_mode & 0o777 == 0o700
    assert b"What is" not in proxy.shadow_log.read_bytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_options_that_are_recommended_exist(version: str) -> None:
    """Those of vLLM; tests/test_docs.py looks at our own."""
    ours = {name for command in main.commands.values() for option in command.params for name in option.opts}
    others = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", PAGE)) - ours - {"--fail", "--retry", "--retry-connrefused"}
    root = sources(version) / "vllm"
    files = [root / "engine" / "arg_utils.py", *root.glob("entrypoints/*/cli_args.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert others
    for option in others:
        assert f'"{option}"' in text or f"\n    {option[2:].replace('-', '_')}:" in text, option


def test_the_page_has_the_alerts_as_they_are() -> None:
    """All of them, with their severities."""
    listed = re.findall(r"^\| `(W4A8\w+)` \| (\w+) \|", PAGE, re.MULTILINE)
    groups = yaml.safe_load((KIT / "prometheus" / "w4a8.rules.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert sorted(listed) == sorted((rule["alert"], rule["labels"]["severity"]) for rule in rules)
