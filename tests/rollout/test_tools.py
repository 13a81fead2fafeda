"""scripts/fetch_rollout_tools.sh, with an apt that gives what the test says."""

import os
import subprocess
from pathlib import Path

import pytest
import rollout_proxy
from paths import ROOT


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Return a directory to fetch in, with an apt of its own: programs of a package do what `package` says."""
    programs = {
        "apt-get": 'case "$*" in *download*) touch tools.deb ;; esac',
        "dpkg": f"""
            for name in sbin/nginx bin/promtool bin/prometheus lib/nginx/modules/ngx_http_js_module.so; do
                mkdir -p "$(dirname "$3/usr/$name")"
                cp {tmp_path}/package "$3/usr/$name"
            done""",
    }
    (tmp_path / "path").mkdir()
    for name, text in programs.items():
        (tmp_path / "path" / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / "path" / name).chmod(0o755)
    return tmp_path


def fetch(here: Path, exit_code: int) -> subprocess.CompletedProcess[str]:
    """Run the script for a relative directory; what it unpacks exits so."""
    (here / "package").write_text(f"#!/bin/sh\nexit {exit_code}\n", encoding="utf-8")
    (here / "package").chmod(0o755)
    variables = {"PATH": f"{here / 'path'}:{os.environ['PATH']}", "W4A8_ROLLOUT_TOOLS": "some/where"}
    command = [str(ROOT / "scripts" / "fetch_rollout_tools.sh")]
    return subprocess.run(
        command, cwd=here, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_relative_directory_is_where_it_is_called(here: Path) -> None:
    """And what is there and runs is not fetched again."""
    assert fetch(here, 0).stdout == f"nginx and Prometheus are in {here}/some/where\n"
    assert (here / "some" / "where" / "usr" / "sbin" / "nginx").is_file()
    (here / "path" / "apt-get").unlink()
    assert (fetch(here, 0).returncode, fetch(here, 0).stdout) == (0, "")


def test_programs_that_do_not_run_are_not_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those without their shared libraries, which exit with 127: the tests skip, and say so."""
    result = fetch(here, 127)
    assert result.returncode == 1
    assert "do not run here" in result.stderr
    assert not (here / "some").exists()
    monkeypatch.setattr(rollout_proxy, "TOOLS", here)
    monkeypatch.setenv("PATH", str(here / "path"))
    (here / "usr" / "bin").mkdir(parents=True)
    (here / "package").rename(here / "usr" / "bin" / "promtool")
    with pytest.raises(pytest.skip.Exception, match="ROLLOUT NOT TESTED: no promtool that runs is here"):
        rollout_proxy.tool("promtool")
