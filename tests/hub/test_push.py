"""Uploads with the real huggingface_hub client to a Hub on this machine, right ones and failing ones."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils._http as hub_http
import pytest
import torch
from checkpoint_edits import edit_tensors, snapshot, write_case
from click.testing import CliRunner, Result
from hub_server import DROP, TOKEN, Hub, Repo, lead_client, serve
from safetensors.torch import save_file

from convert_w4a8.cli.main import main
from convert_w4a8.verification import proof

REPO = "org/model"

# The client's own business with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint with a side file in a directory, which the Hub stores as LFS, and a card."""
    return write_case("gptq-side-files", tmp_path_factory.mktemp("push") / "in").path


@pytest.fixture(scope="module")
def out(source: Path) -> Path:
    """Convert it into several files."""
    target = source.parent / "out"
    arguments = ["convert", str(source), str(target), "--quiet", "--max-shard-size", "300KB"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub, lead the client to it, and let its retries follow at once."""
    with serve() as running:
        lead_client(running, monkeypatch)
        yield running
        huggingface_hub.close_session()


def push(out: Path, source: Path, *options: str, repo: str = REPO) -> Result:
    """Run `w4a8 push`. Whatever happens, the token is not shown and the checkpoint not changed."""
    before = snapshot(out)
    arguments = ["push", str(out), repo, "--source", str(source), *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert TOKEN not in result.output
    assert snapshot(out) == before
    assert not any(TOKEN.encode() in content for content in before.values())
    return result


def refusal(result: Result) -> str:
    """Return the one line of a failure; what the client logs about its retries stands before it."""
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert lines == [result.stderr.splitlines()[-1]]
    return lines[0]


def again(out: Path, source: Path) -> str:
    """Return the command that continues."""
    return f"w4a8 push {out} {REPO} --source {source}"


# What arrives.


def test_repository_holds_the_checkpoint(hub: Hub, out: Path, source: Path) -> None:
    """Every file arrives, byte for byte, in one commit; the address is printed."""
    result = push(out, source)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"pushed     {hub.url}/{REPO}\n"
    files = hub.repos[REPO].files()
    assert files.pop(".gitattributes") == b""
    assert files == snapshot(out)
    assert [branch for branch, _ in hub.repos[REPO].commits] == ["main"]
    assert not hub.repos[REPO].private


def test_only_the_checkpoint_is_uploaded(hub: Hub, out: Path, source: Path, tmp_path: Path) -> None:
    """Hidden files, such as one with secrets, stay at home; added documents go along."""
    copy = tmp_path / "out"
    for name, content in snapshot(out).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    for name in (".env", ".git/config", "sub/.hidden"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"secret")
    (copy / "NOTES[1].md").write_bytes(b"notes")
    assert push(copy, source).exit_code == 0
    assert hub.repos[REPO].files().keys() - {".gitattributes"} == snapshot(out).keys() | {"NOTES[1].md"}


def test_added_weights_of_other_formats_stop_a_push(hub: Hub, out: Path, source: Path, tmp_path: Path) -> None:
    """A pickle beside ours would run whatever is in it."""
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"x")
    line = refusal(push(tmp_path / "out", source))
    assert "pytorch_model.bin: is in the output, but not in the source, and may run code" in line
    assert not hub.repos


def test_private_and_branch(hub: Hub, out: Path, source: Path) -> None:
    """`--private` makes a private repository; `--revision` makes and fills a branch, and leaves main alone."""
    result = push(out, source, "--private", "--revision", "lut-v1")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"{hub.url}/{REPO}/tree/lut-v1\n")
    assert hub.repos[REPO].private
    assert hub.repos[REPO].files("main").keys() == {".gitattributes"}
    assert hub.repos[REPO].files("lut-v1").keys() > snapshot(out).keys()


def test_second_push_sends_nothing(hub: Hub, out: Path, source: Path) -> None:
    """What is there already is not sent again, and makes no commit."""
    push(out, source)
    sent, commits = len(hub.uploads()), list(hub.repos[REPO].commits)
    assert push(out, source).exit_code == 0
    assert len(hub.uploads()) == sent
    assert hub.repos[REPO].commits == commits


@pytest.mark.slow
def test_convert_pushes_what_it_wrote(hub: Hub, source: Path, tmp_path: Path) -> None:
    """`--push-to` converts, verifies and uploads; a branch follows the @."""
    arguments = ["convert", str(source), str(tmp_path / "out"), "--push-to", f"{REPO}@dev", "--private"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"pushed     {hub.url}/{REPO}/tree/dev\n")
    assert hub.repos[REPO].private
    assert hub.repos[REPO].files("dev").items() > snapshot(tmp_path / "out").items()


def test_as_a_program(hub: Hub, out: Path, source: Path, tmp_path: Path) -> None:
    """The same through the environment that a user sets, in a process of its own."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from convert_w4a8.cli.main import main; main()"]
    result = subprocess.run(
        [*command, "push", str(out), REPO, "--source", str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, f"pushed     {hub.url}/{REPO}\n"), result.stderr
    assert TOKEN not in result.stderr
    assert not any(TOKEN.encode() in content for content in snapshot(tmp_path).values())


# What is refused.


def test_what_does_not_verify_is_not_pushed(hub: Hub, out: Path, source: Path, tmp_path: Path) -> None:
    """A damaged output is refused before the Hub is asked for anything."""
    arguments = ["convert", str(source), str(tmp_path / "out"), "--quiet"]
    CliRunner().invoke(main, arguments, catch_exceptions=False)
    edit_tensors(tmp_path / "out", lambda t: t["model.norm.weight"].zero_())
    line = refusal(push(tmp_path / "out", source))
    assert "does not pass verification, nothing was uploaded (1 problems; model.norm.weight: differs from" in line
    assert not hub.requests
    assert out.is_dir()


def test_other_weights_are_neither_mixed_nor_deleted(hub: Hub, out: Path, source: Path) -> None:
    """A repository that holds other shards is refused; they stay."""
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].branches["main"]["model-00001-of-00009.safetensors"] = ("regular", b"precious")
    line = refusal(push(out, source))
    assert (
        f"{REPO}: model-00001-of-00009.safetensors: is on the Hub, but not in {out} (1 such); push to another" in line
    )
    assert not hub.repos[REPO].commits


def test_a_foreign_index_is_refused(hub: Hub, source: Path, tmp_path: Path) -> None:
    """An index of other shards would send vLLM to files that are not ours, and not to the one that is."""
    out = tmp_path / "one-file"
    arguments = ["convert", str(source), str(out), "--quiet"]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    assert not (out / "model.safetensors.index.json").exists()
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].branches["main"]["model.safetensors.index.json"] = ("regular", b"{}")
    line = refusal(push(out, source))
    assert f"{REPO}: model.safetensors.index.json: is on the Hub, but not in {out} (1 such)" in line
    assert not hub.repos[REPO].commits


@pytest.mark.parametrize("name", ["model", "a/b/c", "org/", "@main"])
def test_what_is_no_repository_is_refused(hub: Hub, out: Path, source: Path, name: str) -> None:
    """Names that are not org/name are refused before any work."""
    assert refusal(push(out, source, repo=name)).endswith("is not a repository on the Hub; give org/name")
    assert not hub.requests


def test_names_that_the_hub_does_not_allow(hub: Hub, out: Path, source: Path) -> None:
    """The client's own check of names is passed on, in one line."""
    assert "org/a--b: the Hub refused (" in refusal(push(out, source, repo="org/a--b"))
    assert not hub.requests


# What fails. Each fault hits until it is lifted; the client's own retries are part of the test.


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the verification for passed, which the tests above do not."""
    passed = proof.Verification("lut", (), ())
    monkeypatch.setattr(proof, "verify", lambda *_, **__: passed)


REMEDY = {
    401: "the Hub does not accept your token, or there is none (401); run `hf auth login` or set HF_TOKEN, then: ",
    403: "your token may not write there (403); use a token with write access to org, then: ",
    500: "the Hub failed (500); run this to continue; what has arrived is not sent again: ",
    429: "the Hub failed (429); run this to continue; what has arrived is not sent again: ",
}
STEPS = {
    "create": "POST /api/repos/create",
    "list": "GET .*/tree/",
    "validate": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "storage": "PUT ",
    "commit": "POST .*/commit/",
}


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize("status", [500, DROP], ids=["500", "dropped"])
@pytest.mark.parametrize("step", STEPS)
def test_failing_hub_can_be_continued(hub: Hub, out: Path, source: Path, step: str, status: int) -> None:
    """Whichever request fails for good, one line names the command that continues, and it does."""
    hub.faults.append((STEPS[step], status))
    line = refusal(push(out, source))
    assert line.endswith(again(out, source))
    assert ("the Hub failed (500)" if status else "the upload broke off (RemoteProtocolError") in line
    hub.faults.clear()
    assert push(out, source).exit_code == 0
    assert hub.repos[REPO].files().items() > snapshot(out).items()


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize("status", sorted(REMEDY))
@pytest.mark.parametrize("step", ["create", "storage", "commit"])
def test_reason_and_remedy(hub: Hub, out: Path, source: Path, step: str, status: int) -> None:
    """What to do depends on what the Hub answers."""
    hub.faults.append((STEPS[step], status))
    assert refusal(push(out, source)) == f"Error: {REPO}: {REMEDY[status]}{again(out, source)}"


@pytest.mark.usefixtures("verified")
def test_shards_that_arrived_are_not_sent_again(hub: Hub, out: Path, source: Path) -> None:
    """After a broken connection at one shard, the others are skipped."""
    push(out, source)
    objects = dict(hub.objects)
    hub.repos.clear()
    hub.objects.clear()
    hub.requests.clear()
    last = max(objects)
    hub.faults.append((f"PUT .*{last}", DROP))
    refusal(push(out, source))
    arrived = set(hub.objects)
    assert last not in arrived
    hub.faults.clear()
    hub.requests.clear()
    assert push(out, source).exit_code == 0
    assert sorted(hub.uploads()) == sorted(objects.keys() - arrived)
    assert hub.objects == objects


@pytest.mark.usefixtures("verified")
def test_a_passing_fault_is_not_noticed(hub: Hub, out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own retries get over a fault that passes."""
    hub.faults.append(("PUT ", 503))
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda _seconds: hub.faults.clear()))
    assert push(out, source).exit_code == 0
    assert hub.repos[REPO].files().items() > snapshot(out).items()


@pytest.mark.usefixtures("verified")
def test_no_token(hub: Hub, out: Path, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a token the line says how to log in."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
    assert "or there is none (401); run `hf auth login` or set HF_TOKEN, then: w4a8 push" in refusal(push(out, source))
    assert not hub.repos


def test_wrong_token_is_found_before_the_conversion(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--push-to` asks for permission before hours of work; nothing is written."""
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    result = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--push-to", REPO])
    assert re.search(r"\(401\); run `hf auth login` or set HF_TOKEN, then: the same command$", refusal(result))
    assert not hub.repos
    assert not list(tmp_path.iterdir())


def test_failed_upload_after_a_conversion_keeps_it(hub: Hub, source: Path, tmp_path: Path) -> None:
    """The conversion stays, and the line says how to push it."""
    hub.faults.append((STEPS["storage"], 500))
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["convert", str(source), str(out), "--push-to", REPO, "--private"])
    assert refusal(result).endswith(f"{again(out, source)} --private")
    hub.faults.clear()
    assert push(out, source, "--private").exit_code == 0


@pytest.mark.usefixtures("verified")
def test_interrupted_upload_says_how_to_continue(
    hub: Hub, out: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during the upload is not taken for a conversion that wrote nothing."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", interrupt)
    result = push(out, source)
    assert result.exit_code == 130
    assert result.stderr.endswith(
        f"Interrupted; run this to continue; what has arrived is not sent again: {again(out, source)}\n"
    )
    assert hub.repos


@pytest.mark.usefixtures("verified")
def test_the_token_is_taken_out_of_what_the_hub_says(hub: Hub, out: Path, source: Path) -> None:
    """What the Hub refuses for other reasons is passed on in its words, without the token that they repeat."""
    hub.faults.append((STEPS["commit"], 413))
    assert f"{REPO}: the Hub refused (fault 413 for Bearer (token)); mend that, then: " in refusal(push(out, source))


def test_weights_beside_the_model_are_pushed(hub: Hub, tmp_path: Path) -> None:
    """With the index that keeps vLLM from loading them as weights of the model."""
    source = write_case("gptq-v1", tmp_path / "in").path
    (source / "lora").mkdir()
    for name in ("adapter_model.safetensors", "lora/adapter_model.safetensors"):
        save_file({"x": torch.ones(1)}, source / name)
    result = CliRunner().invoke(
        main, ["convert", str(source), str(tmp_path / "out"), "--quiet"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert push(tmp_path / "out", source).exit_code == 0
    sent = set(hub.repos[REPO].branches["main"])
    assert {"adapter_model.safetensors", "lora/adapter_model.safetensors", "model.safetensors.index.json"} <= sent
