"""Names to directories: paths, and Hub ids from a cache that was made by hand, without a network."""

import fnmatch
import os
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_edits import snapshot, write_case
from click.testing import CliRunner
from huggingface_hub import constants

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cli.convert import convert_command
from convert_w4a8.cli.main import main
from convert_w4a8.errors import ConvertError
from convert_w4a8.hub.repository import resolve_input

MAIN, OLD = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point huggingface_hub at an empty cache and cut the network; it read its environment at import."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return cache


def cache_repository(cache: Path, repo_id: str, source: Path, refs: dict[str, str]) -> dict[str, Path]:
    """Lay a directory out as huggingface_hub does: blobs, snapshots of links to them, and refs; one a commit."""
    storage = cache / f"models--{repo_id.replace('/', '--')}"
    (storage / "blobs").mkdir(parents=True, exist_ok=True)
    snapshots = {}
    for ref, commit in refs.items():
        root = storage / "snapshots" / commit
        for number, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
            blob = storage / "blobs" / f"{number:040x}"
            blob.write_bytes(file.read_bytes())
            link = root / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        (storage / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (storage / "refs" / ref).write_text(commit)
        snapshots[ref] = root
    return snapshots


@pytest.mark.parametrize(
    ("name", "ref"),
    [
        ("org/model", "main"),
        ("org/model@main", "main"),
        ("org/model@", "main"),
        ("org/model@v1.0", "v1.0"),
        (f"org/model@{OLD}", "v1.0"),
        ("org/model@refs/pr/7", "refs/pr/7"),
    ],
)
def test_cached_id_is_found_without_a_network(name: str, ref: str, offline: Path, tmp_path: Path) -> None:
    """A branch, a tag, a commit or a pull request of a cached repository is its snapshot, which opens."""
    source = write_case("gptq-side-files", tmp_path / "in")
    snapshots = cache_repository(offline, "org/model", source.path, {"main": MAIN, "v1.0": OLD, "refs/pr/7": "3" * 40})
    found = resolve_input(name)
    assert found == snapshots[ref]
    checkpoint, original = open_checkpoint(found), open_checkpoint(source.path)
    assert checkpoint.tensors.keys() == original.tensors.keys()
    assert checkpoint.side_files == original.side_files


def test_cached_id_converts_and_verifies(offline: Path, tmp_path: Path) -> None:
    """The whole way from an id: files behind links are copied as files, and the cache is not touched."""
    source = write_case("gptq-v1", tmp_path / "in")
    cache_repository(offline, "org/model", source.path, {"main": MAIN})
    before = snapshot(offline)
    out = tmp_path / "out"
    runner = CliRunner()
    result = runner.invoke(convert_command, ["org/model", str(out), "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert all((out / name).read_bytes() == content for name, content in source.side_files.items())
    verified = runner.invoke(main, ["verify", str(out), "--source", "org/model"], catch_exceptions=False)
    assert verified.exit_code == 0, verified.output
    assert runner.invoke(main, ["inspect", "org/model"], catch_exceptions=False).exit_code == 0
    assert snapshot(offline) == before


@pytest.mark.parametrize("name", ["org/unknown", "org/model@v9", f"org/model@{'9' * 40}"])
def test_what_is_not_cached_is_one_clear_line(name: str, offline: Path, tmp_path: Path) -> None:
    """An unknown id or revision says that it is neither in the cache nor to be had, and what to check."""
    source = write_case("gptq-v1", tmp_path / "in")
    cache_repository(offline, "org/model", source.path, {"main": MAIN})
    result = CliRunner().invoke(convert_command, [name, str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {name}: is not in the Hub's cache, and the Hub cannot be reached; check the id and the network\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["-org/model", "org/model--", "o rg/model", "org/mo..del", "org/" + "x" * 200])
def test_what_cannot_be_an_id_is_one_clear_line(name: str) -> None:
    """Names that the Hub forbids are refused by its own rules, in one line."""
    with pytest.raises(ConvertError) as caught:
        resolve_input(name)
    assert caught.value.problem.subject == name
    assert "cannot be downloaded" in caught.value.problem.reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["absent", "./org/model", "/absent/model", "~/absent-w4a8", "a/b/c", "@main", "../x/y"]
)
def test_what_is_no_directory_and_no_id_is_refused(name: str) -> None:
    """Paths are never looked up on the Hub; the message says what can be given."""
    with pytest.raises(ConvertError) as caught:
        resolve_input(name)
    assert caught.value.problem.reason == "is not a directory"
    assert "Hub id (org/name[@revision])" in caught.value.problem.remedy


def test_a_file_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the form of an id is a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").write_bytes(b"")
    with pytest.raises(ConvertError, match="org/model: is not a directory"):
        resolve_input("org/model")


def test_a_local_directory_wins(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """org/model in the current directory is meant, even if the Hub has one of that name; its links are kept."""
    source = write_case("gptq-v1", tmp_path / "in")
    cache_repository(offline, "org/model", source.path, {"main": MAIN})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").symlink_to(source.path)
    assert resolve_input("org/model") == Path("org/model")


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in a quoted argument is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_input("~/model") == tmp_path / "model"


def test_weights_in_other_formats_are_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A repository that also holds pickles costs no more to download than its safetensors."""
    asked: dict[str, object] = {}

    def download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_input("org/model@v1") == tmp_path
    assert (asked["repo_id"], asked["revision"]) == ("org/model", "v1")
    ignored = asked["ignore_patterns"]
    assert isinstance(ignored, list)

    def is_ignored(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in ignored)

    assert all(map(is_ignored, ["pytorch_model.bin", "model.pth", "original/x.pt", "a.gguf", "tf_model.h5"]))
    assert not any(
        map(is_ignored, ["model.safetensors", "config.json", "tokenizer.model", "model.safetensors.index.json"])
    )


def test_a_cache_that_cannot_be_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HOME within a file, as the system says it when the client looks for a token there."""

    def fail(*_: object, **__: object) -> None:
        raise NotADirectoryError(20, "Not a directory", "/a/file/token")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConvertError, match=r"cannot be downloaded \(/a/file/token: Not a directory\)"):
        resolve_input("org/name")
