"""`w4a8 check ORG/NAME --sample`: only headers and the tensors of the sample come over the network."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_edits import snapshot, write_case
from click.testing import CliRunner, Result
from hub_server import DROP, TOKEN, Hub, Repo, lead_client, serve

from convert_w4a8.cli.main import main
from convert_w4a8.hub import partial

REPO = "org/model"
SMALL = ("config.json", "model.safetensors.index.json", "README.md")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint whose layers' parts lie in different files."""
    return write_case("gptq-qwen3-moe-sharded", tmp_path_factory.mktemp("remote") / "in").path


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub that has it on a branch. Temporary files go to a directory that must be empty in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    with serve() as running:
        lead_client(running, monkeypatch)
        files = {name: ("lfs", content) for name, content in snapshot(source).items()}
        running.repos[REPO] = Repo(private=True, branches={"main": {}, "v1": files})
        yield running
        huggingface_hub.close_session()
    assert not list(tmp_path.iterdir())


def run(name: object) -> Result:
    """Sample a checkpoint."""
    result = CliRunner().invoke(main, ["check", str(name), "--sample", "--json"], catch_exceptions=False)
    assert TOKEN not in result.output
    return result


def refusal(result: Result) -> str:
    """Return the one line of a failure, which the document for programs says too."""
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    (problem,) = json.loads(result.stdout)["problems"]
    assert line == "Error: {subject}: {reason}; {remedy}".format(**problem)
    return line


@pytest.mark.parametrize("piece", [1 << 20, 1000], ids=["whole", "pieces"])
def test_figures_are_those_of_the_files_and_little_is_sent(
    hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """The sample is that of a local directory; sent are configuration, index, headers and its tensors, no byte more."""
    monkeypatch.setattr(partial, "_PIECE", piece)
    here, there = (json.loads(run(name).stdout) for name in (source, f"{REPO}@v1"))
    assert there["name"] == f"{REPO}@v1"
    assert there["figures"] == here["figures"]
    assert there["ok"]
    files = snapshot(source)
    small = sum(len(files[name]) for name in SMALL if name in files)
    shards = [content for name, content in files.items() if name.endswith(".safetensors")]
    headers = sum(8 + int.from_bytes(content[:8], "little") for content in shards)
    assert hub.sent == small + headers + there["figures"]["bytes_in"]
    assert hub.sent < sum(map(len, shards)) / 2


@pytest.mark.parametrize("fault", [404, 403, 500, DROP])
@pytest.mark.parametrize("request_", ["GET /api/models/", "GET .*/resolve/.*config.json", "GET .*/resolve/.*-00002-of"])
def test_failing_hub_is_one_line(hub: Hub, request_: str, fault: int) -> None:
    """Whatever fails, the line names it and says what to check."""
    hub.faults.append((request_, fault))
    line = refusal(run(f"{REPO}@v1"))
    assert line.startswith(f"Error: {REPO}")
    assert "cannot be fetched (" in line
    assert line.endswith("check the id, the revision, `hf auth` and the network")


def test_unknown_revision(hub: Hub) -> None:
    """A branch that is not there is said to be so."""
    assert "404" in refusal(run(f"{REPO}@v2"))
    assert hub.sent == 0


def test_server_that_sends_whole_files_is_refused(hub: Hub) -> None:
    """A proxy that ignores ranges would send 100 GB: the first answer of that kind ends it."""
    hub.ranges = False
    assert "cannot be fetched in parts; download the checkpoint first" in refusal(run(f"{REPO}@v1"))


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 1, 0])
def test_lying_header_lengths_are_refused(hub: Hub, length: int) -> None:
    """A header cannot be longer than its file, and nothing of it is fetched then."""
    files = hub.repos[REPO].branches["v1"]
    name = next(name for name in files if name.endswith(".safetensors"))
    files[name] = ("lfs", length.to_bytes(8, "little") + files[name][1][8:])
    assert f"{REPO}: {name}: header length {length} does not fit a file of" in refusal(run(f"{REPO}@v1"))


def elsewhere(files: dict[str, bytes], how: str) -> dict[str, bytes]:
    """Return the same checkpoint with settings, index or shards in other places."""
    files = dict(files)
    if how == "index":
        files["gptq_model-4bit-128g.safetensors.index.json"] = files.pop("model.safetensors.index.json")
    elif how == "settings":
        config = json.loads(files["config.json"])
        files["quantize_config.json"] = json.dumps(config.pop("quantization_config")).encode()
        files["config.json"] = json.dumps(config).encode()
    else:
        index = json.loads(files["model.safetensors.index.json"])
        index["weight_map"] = {name: f"parts/{file}" for name, file in index["weight_map"].items()}
        files = {f"parts/{name}" if name.endswith(".safetensors") else name: data for name, data in files.items()}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        files["parts/more.safetensors"] = b"is not asked for"
    return files


@pytest.mark.parametrize("how", ["index", "settings", "directory"])
def test_what_lies_elsewhere_is_fetched_too(how: str, hub: Hub, source: Path) -> None:
    """The names of settings and indexes are those by which a directory is opened."""
    files = elsewhere(snapshot(source), how)
    hub.repos[REPO].branches["v2"] = {name: ("lfs", content) for name, content in files.items()}
    here, there = (json.loads(run(name).stdout) for name in (source, f"{REPO}@v2"))
    assert there["figures"] == here["figures"]
    assert there["ok"]
