"""A Hub that lies about sizes and names: one line, and no file but those that are meant."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from checkpoint_edits import snapshot, write_case

from convert_w4a8.errors import ConvertError
from convert_w4a8.hub import partial
from convert_w4a8.hub.partial import open_remote


class Liar:
    """Answers as the Hub does, but for one lie."""

    def __init__(self, files: dict[str, bytes], **lies: Any) -> None:
        self.files, self.lies = files, lies

    def model_info(self, *_: object, **__: object) -> SimpleNamespace:
        """Return the commit."""
        return SimpleNamespace(sha="0" * 40)

    def list_repo_files(self, *_: object, **__: object) -> list[str]:
        """Return the names of files."""
        return [*self.files, *self.lies.get("names", ())]

    def get(self, _method: str, url: str, headers: dict[str, str]) -> SimpleNamespace:
        """Return a file, or some of it."""
        content = self.files[url.rpartition("/")[2]]
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        if span is None:
            return SimpleNamespace(content=content, status_code=200, headers={})
        said = {"Content-Range": f"bytes 0-0/{self.lies.get('total', len(content))}"}
        part = content[int(span[1]) : int(span[2]) + 1]
        return SimpleNamespace(content=part, status_code=206, headers=said if self.lies.get("range", True) else {})


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint."""
    return snapshot(write_case("gptq-v1", tmp_path / "in").path)


def opened(liar: Liar, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Open its checkpoint in an empty directory; return why not, or nothing."""
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: liar)
    monkeypatch.setattr(huggingface_hub.utils, "http_backoff", liar.get)
    monkeypatch.setattr(huggingface_hub.utils, "hf_raise_for_status", lambda _response: None)
    monkeypatch.setattr(huggingface_hub.utils, "build_hf_headers", dict)
    place.mkdir()
    try:
        open_remote("org/name", place)
    except ConvertError as error:
        return str(error)
    return ""


def test_the_truth_is_believed(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lie it works, so that what follows is the lies' doing."""
    assert not opened(Liar(files), tmp_path / "here", monkeypatch)
    assert not list((tmp_path / "here").glob("*.txt"))


TOTALS = ("", "x", "-1", "*", "1e9", "٤٤٤٤", "9" * 5000, "9" * 19, "999999999999999999", "0", "7")


@pytest.mark.parametrize("total", TOTALS, ids=lambda total: ascii(total)[:12])
def test_totals_that_are_none(
    total: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a file that cannot be: no digits, too many, more than the disk can address, less than the header."""
    line = opened(Liar(files, total=total), tmp_path / "here", monkeypatch)
    assert line.startswith("org/name: model.safetensors: ") or str(tmp_path / "here" / "model.safetensors") in line


def test_ranges_without_a_total(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part without a word of what it is a part of."""
    line = opened(Liar(files, range=False), tmp_path / "here", monkeypatch)
    assert "cannot be fetched in parts; download the checkpoint first" in line


NAMES = (
    "a\0b.safetensors",
    "x" * 300 + ".safetensors",
    "a\nb.safetensors",
    "\ud800.safetensors",
    "\x1b[2J.safetensors",
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:12])
def test_names_that_are_none(
    name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that no file here can have are refused before anything is written."""
    line = opened(Liar(files, names=[name]), tmp_path / "here", monkeypatch)
    assert "is no name of a file; rename it on the Hub" in line
    assert line.isprintable()
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "../config.json"])
def test_names_that_lead_elsewhere_are_not_fetched(
    name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights lie beside the configuration, and nothing else is asked for."""
    before = sorted(tmp_path.iterdir())
    assert not opened(Liar(files, names=[name]), tmp_path / "here", monkeypatch)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "here"])
    assert partial._NAME.fullmatch("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["../../secret", "/tmp/secret", "a/../../secret", "a//b", "\0", "a\n/b"])
def test_names_in_an_index_that_are_no_places(
    name: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index may list files in directories: none of them lies outside, whatever the Hub has under that name."""
    weights = f"{name}.safetensors"
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": weights}}).encode()
    files[weights] = files["model.safetensors"]
    assert opened(Liar(files), tmp_path / "there", monkeypatch)
    inside = {path.name for path in (tmp_path / "there").rglob("*")}
    assert inside <= {*files, "a"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "there"}
