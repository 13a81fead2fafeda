"""The tables of the documents are those of the kept figures, and their commands can be run."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

sys.path.append(str(ROOT / "scripts" / "bench"))
import results
import table_columns
import tables

pytestmark = pytest.mark.slow

RESULTS = ROOT / "docs" / "benchmarks" / "results"
NAMES = sorted(path.stem for path in RESULTS.glob("*.json"))
EVERY_TABLE = pytest.mark.parametrize("name", NAMES)
KEYS = {"question", "command", "date", "commit", "machine", "versions", "rows"}
OTHER_KEYS = {"setup", "note", "settings", "transcribed"}


def check(root: Path) -> "subprocess.CompletedProcess[str]":
    """Run `tables.py --check` of a checkout."""
    command = [sys.executable, str(root / "scripts" / "bench" / "tables.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read(name: str) -> dict[str, Any]:
    """Return the document of a table."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


@functools.cache
def help_text(script: str) -> str:
    """Return what a script's --help prints. Skips the test where it needs a package that is not installed."""
    command = [sys.executable, str(ROOT / script), "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if found.returncode and "ModuleNotFoundError" in found.stderr:
        pytest.skip(found.stderr.splitlines()[-1])
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy what tables are made of and where they stand."""
    for directory in ("docs", "scripts/bench"):
        shutil.copytree(ROOT / directory, tmp_path / directory)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_tables_are_current() -> None:
    """Every table is that of its figures; every file of figures has one table, and every table its file."""
    found = check(ROOT)
    assert (found.returncode, found.stdout) == (0, "")


def test_columns_are_in_the_module_of_their_document() -> None:
    """Once each, so that there is one place to look for them."""
    places = {
        name: path.stem
        for path in (ROOT / "docs").rglob("*.md")
        for name, _ in tables.MARKED.findall(path.read_text(encoding="utf-8"))
    }
    found = [(name, each.__name__) for each in table_columns.DOCUMENTS for name in each.COLUMNS]
    assert sorted(found) == sorted((name, f"columns.{place}") for name, place in places.items())


@EVERY_TABLE
def test_a_changed_figure_is_noticed(name: str, copy: Path) -> None:
    """In every table: its last figure times 1.5, or 1.5 for 0, makes the check name this table and no other."""
    path = copy / "docs" / "benchmarks" / "results" / f"{name}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    row = document["rows"][-1]
    shown = set(re.findall(r"\{(\w+)", " ".join(template for _, template in table_columns.COLUMNS[name])))
    key = [key for key, value in row.items() if key in shown and (not isinstance(value, str) or value[:1].isdigit())][
        -1
    ]
    row[key] = (row[key] or 1) * 1.5 if not isinstance(row[key], str) else f"9{row[key]}"
    path.write_text(results.dumps(document), encoding="utf-8")
    found = check(copy)
    assert (found.returncode, found.stdout) == (1, f"{name}: not current; run scripts/bench/tables.py\n")


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "message"),
    [
        ("serving.md", r"\| 40\.48 \|", "| 40.49 |", "serving: not current"),
        ("serving.md", "table: serving -->", "table: nothing -->", "nothing: no nothing.json"),
        ("serving.md", r"(?s)<!-- table: serving -->.*?<!-- end -->", "", "serving: in docs/benchmarks/results, but"),
        ("serving.md", "table: load-time -->", "table: serving -->", "serving: more than one table"),
    ],
)
def test_what_does_not_fit_is_named(copy: Path, file: str, pattern: str, replacement: str, message: str) -> None:
    """A figure changed by hand, a table without figures, figures without a table, a table twice."""
    path = copy / "docs" / "benchmarks" / file
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"))
    assert count == 1
    path.write_text(text, encoding="utf-8")
    found = check(copy)
    assert found.returncode == 1
    assert message in found.stdout


def test_tables_are_written(copy: Path) -> None:
    """Tables that are gone come back as they were."""
    document = copy / "docs" / "benchmarks" / "serving.md"
    before = document.read_text(encoding="utf-8")
    document.write_text(tables.MARKED.sub(r"<!-- table: \1 -->\n<!-- end -->", before), encoding="utf-8")
    subprocess.run([sys.executable, str(copy / "scripts" / "bench" / "tables.py")], capture_output=True, check=True)
    assert document.read_text(encoding="utf-8") == before


@EVERY_TABLE
def test_a_table_says_what_every_table_says(name: str) -> None:
    """All keys are there and no others; only copied figures may lack commit and date; each question is asked once."""
    document = read(name)
    assert document.keys() >= KEYS
    assert document.keys() <= KEYS | OTHER_KEYS
    assert document["rows"]
    assert document.get("transcribed") or (document["commit"] and document["date"])
    assert [other for other in NAMES if read(other)["question"] == document["question"]] == [name]


@EVERY_TABLE
def test_commands_can_be_run(name: str) -> None:
    """Every script of a table's commands exists, and its --help has their options; those that measure have --keep."""
    document = read(name)
    measuring, before = document["command"].splitlines(), document.get("setup", "").splitlines()
    assert measuring
    for command in [*before, *measuring]:
        program, script, *arguments = shlex.split(command)
        if command in before and (program != "python"):
            continue  # tests/test_docs.py looks at w4a8-convert
        assert program == "python"
        assert (ROOT / script).is_file()
        assert command in before or "--keep NAME" in help_text(script)
        for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_text(script)), option


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point RESULTS somewhere else, and say what runs."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    script = str(ROOT / "scripts" / "bench" / "bench_startup.py")
    monkeypatch.setattr(sys, "argv", [script, "--rounds", "2", "--keep", "startup", "--json=FILE"])
    return tmp_path / "startup.json"


def test_nothing_is_written_unless_asked_for(kept: Path) -> None:
    """Neither --json nor --keep."""
    document = results.save(Namespace(json=None, keep=None), "What?", [{"a": 1}])
    assert document.keys() == KEYS
    assert not list(kept.parent.iterdir())


def test_kept_figures_replace_the_answer_and_not_the_question(kept: Path) -> None:
    """Question and preparation stay; note, figures and the mark of copied ones go. The command can be pasted."""
    old = {"question": "Old?", "setup": "make it", "transcribed": True, "note": "of old figures", "rows": [{"a": 1}]}
    kept.write_text(json.dumps(old), encoding="utf-8")
    results.save(Namespace(json=None, keep="startup"), "New?", [{"a": 0.123456789}])
    document = json.loads(kept.read_text(encoding="utf-8"))
    assert document.keys() == KEYS | {"setup"}
    assert (document["question"], document["setup"], document["rows"]) == ("Old?", "make it", [{"a": 0.123457}])
    assert document["command"] == "python scripts/bench/bench_startup.py --rounds 2"
    assert document["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["machine"]["cores"] >= 1


def test_rows_are_added_to_those_of_the_same_run_only(kept: Path) -> None:
    """Of one commit, one machine and one set of versions."""
    args = Namespace(json=None, keep="startup")
    results.save(args, "What?", [{"a": 1}], settings={"kernels": {"x": 1}, "layers": 1})
    results.save(args, "What?", [{"a": 2}], extend=True, settings={"kernels": {"y": 2}, "layers": 2})
    sys.argv.append("--more")
    results.save(args, "What?", [{"a": 3}], extend=True)
    document = json.loads(kept.read_text(encoding="utf-8"))
    assert document["rows"] == results.read_results(args) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert document["settings"] == {"kernels": {"x": 1, "y": 2}, "layers": 2}
    first, second = document["command"].splitlines()
    assert second == f"{first} --more"
    for key in ("commit", "machine", "versions"):
        kept.write_text(json.dumps(document | {key: "another"}), encoding="utf-8")
        with pytest.raises(SystemExit, match=f"is of {key} another"):
            results.save(args, "What?", [{"a": 3}], extend=True)
        with pytest.raises(SystemExit, match=f"is of {key} another"):
            results.read_results(args)


@pytest.mark.parametrize("name", ["../serving", "Serving", "a b", "-"])
def test_a_name_is_no_path(kept: Path, name: str) -> None:
    """Nothing is written elsewhere."""
    with pytest.raises(SystemExit, match="small letters"):
        results.save(Namespace(json=None, keep=name), "What?", [])
    assert not kept.exists()


@pytest.mark.parametrize(
    ("template", "row", "cell"),
    [
        ("{a:.2f}", {"a": -1.005}, "−1.00"),
        ("{a:.2f}", {"a": "1 to 2"}, "1 to 2"),
        ("{a:.2f}", {}, ""),
        ("{a:+.1f} ± {b:.1f}", {"a": 1}, ""),
        ("{a:+.0%}", {"a": 0.1234}, "+12 %"),
        ("{a:~}", {"a": 12807.4}, "12807"),
        ("{a:~}", {"a": 48.74}, "48.7"),
        ("{a:~}", {"a": 0.123}, "0.12"),
        ("{a:~%}", {"a": 0.4798}, "48 %"),
        ("{a:~%}", {"a": 0.0105}, "1.05 %"),
        ("{n} × {k}", {"n": 4096, "k": 128}, "4096 × 128"),
    ],
)
def test_cells(template: str, row: dict[str, Any], cell: str) -> None:
    """Numbers as COLUMNS says, text as it is, nothing where nothing is known."""
    assert tables.cell(template, row) == cell
