"""The documents say what the program does: commands, Python names, JSON keys, links, paths. Their examples run."""

import ast
import dataclasses
import inspect
import json
import os
import pydoc
import re
from collections.abc import Collection, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import click
import pytest
from chat_server import Behaviour, chat_server
from checkpoint_edits import write_case
from click.testing import CliRunner
from paths import ROOT

import convert_w4a8
from convert_w4a8.cli.main import main

DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *DOCS.rglob("*.yml")])
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
EVERY_COMMAND = pytest.mark.parametrize("name", sorted(main.commands))
SHARED = "Options of a conversion"
HEADING = re.compile(r"(#+) (.*)")
"""At the beginning of a line outside of code."""


def lines_outside_code(text: str) -> Iterator[str]:
    """Yield the lines of a document that are not within ``` fences; empty lines for the others."""
    inside = False
    for line in text.splitlines():
        fence = line.startswith("```")
        inside ^= fence
        yield "" if inside or fence else line


def sections(path: Path, level: int) -> dict[str, str]:
    """Return heading → text below it, up to the next heading that is as high, of all headings of a level."""
    text = path.read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line, outside in zip(text.splitlines(), lines_outside_code(text), strict=True):
        match = HEADING.fullmatch(outside)
        if match and len(match[1]) <= level:
            current = found.setdefault(match[2].replace("`", ""), []) if len(match[1]) == level else []
        current.append(line)
    return {title: "\n".join(lines) for title, lines in found.items()}


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    matches = map(HEADING.fullmatch, lines_outside_code(path.read_text(encoding="utf-8")))
    titles = [match[2].strip().lower() for match in matches if match]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def cells(section: str) -> dict[str, list[str]]:
    """Return option → cells of its row, from the tables of a section."""
    rows = [re.split(r" ?\| ?", line.strip("| ")) for line in section.splitlines() if line.startswith("| `--")]
    return {row[0].strip("`"): row for row in rows}


def options(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command but `--version`."""
    found = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {option.opts[0]: option for option in found if option.name != "version"}


CLI = sections(DOCS / "reference" / "cli.md", 2)
PYTHON = sections(DOCS / "reference" / "python.md", 3)
JSON = sections(DOCS / "reference" / "json.md", 2)


def code_blocks(text: str) -> list[str]:
    """Return the Python blocks of a text."""
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@EVERY_COMMAND
def test_command_has_help_and_is_in_the_reference(name: str) -> None:
    """Every command explains itself and every option; the reference has all options, no others, and the defaults."""
    command = main.commands[name]
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
    assert command.help
    section = CLI[f"w4a8 {name}"]
    own, shared = cells(section), cells(CLI[SHARED]) if f"[{SHARED.lower()}]" in section else {}
    assert sorted([*own, *shared]) == sorted(options(command))
    for option, parameter in options(command).items():
        assert parameter.help, option
        _, values, default, meaning = (own | shared)[option]
        assert meaning.strip(), option
        if isinstance(parameter.type, click.Choice):
            assert re.findall(r"`([\w-]+)`", values) == sorted(parameter.type.choices, key=values.index), option
        if parameter.required:
            assert default == "required", option
        elif parameter.show_default:
            assert default == f"`{parameter.get_default(click.Context(command))}`", option
        else:
            assert not default.startswith("`"), option


@EVERY_COMMAND
def test_command_is_in_the_readme(name: str) -> None:
    """The README names every command."""
    assert re.search(rf"w4a8[ -]{name} ", (ROOT / "README.md").read_text(encoding="utf-8"))


@EVERY_DOCUMENT
def test_command_lines_have_options_that_exist(document: Path) -> None:
    """Of `w4a8`, and of the scripts."""
    text = document.read_text(encoding="utf-8")
    for command, rest in re.findall(r"(?:^|/| |`)(w4a8-convert|w4a8 \w+) ([^`#|;\n]*)", text, re.MULTILINE):
        found = main.commands.get(command.partition("w4a8")[2][1:])
        if found is not None:
            assert set(re.findall(r"(?<!\S)\[?(--[\w-]+)", rest)) <= {*options(found), "--version", "--help"}, rest
    for script, rest in re.findall(r"((?:scripts|tests)/[\w/]+\.py) ([^`#|;\n]*)", text):
        for option in re.findall(r"(?<!\S)--[\w-]+", rest):
            assert f'"{option}"' in source_of(ROOT / script), f"{script} {option}"


def source_of(script: Path) -> str:
    """Return the text of a script, and of those beside it that it imports, which may add options."""
    text = script.read_text(encoding="utf-8")
    beside = (script.parent / f"{name}.py" for name in re.findall(r"^from (\w+) import", text, re.MULTILINE))
    return text + "".join(path.read_text(encoding="utf-8") for path in beside if path.is_file())


@pytest.mark.parametrize("name", convert_w4a8.__all__)
def test_public_name_is_in_the_reference(name: str) -> None:
    """With its signature, its fields and their defaults, or its values."""
    section, value = PYTHON[name], getattr(convert_w4a8, name)
    assert section.partition("\n")[2].strip()
    if inspect.isfunction(value):
        defaults = {"_DEFAULTS": "Options()", "_DEFAULTS_OF_QUANTIZE": "QuantizeOptions()", "_ignore": "..."}
        defaults |= {"_DEFAULTS_OF_DISTILL": "DistillOptions()", "_ignore_step": "...", "DROP": "'drop'"}
        defaults |= {"_DEFAULTS_OF_EVALUATE": "EvaluateOptions()"}
        assert parameters(code_blocks(section)[0]) == [
            (kind, argument, defaults.get(str(default), default))
            for kind, argument, default in parameters(inspect.getsource(value))
        ]
    elif isinstance(value, type) and issubclass(value, Enum):
        assert re.findall(r'`(\w+)` \("(\w+)"\)', section) == [(member.name, str(member)) for member in value]
    elif dataclasses.is_dataclass(value) and code_blocks(section):
        (definition,) = ast.parse(code_blocks(section)[0]).body
        assert isinstance(definition, ast.ClassDef)
        stated = {ast.unparse(field.target): field for field in definition.body if isinstance(field, ast.AnnAssign)}
        assert list(stated) == [field.name for field in dataclasses.fields(value)]
        for field in dataclasses.fields(value):
            default = stated[field.name].value
            assert default is not None
            assert eval(ast.unparse(default), vars(convert_w4a8) | public_names()) == field.default
    elif dataclasses.is_dataclass(value):
        assert all(f"`{field.name}`" in section for field in dataclasses.fields(value))


def test_the_python_reference_has_no_other_names() -> None:
    """What it describes is public."""
    assert sorted(PYTHON) == sorted(convert_w4a8.__all__)


def public_names() -> dict[str, Any]:
    """Return all of them."""
    return {name: getattr(convert_w4a8, name) for name in convert_w4a8.__all__}


def parameters(source: str) -> list[tuple[str, str, str | None]]:
    """Return kind, name and default of the parameters of a function."""
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    assert not arguments.posonlyargs
    plain = [*[None] * (len(arguments.args) - len(arguments.defaults)), *arguments.defaults]
    pairs = [
        *(("plain", argument, default) for argument, default in zip(arguments.args, plain, strict=True)),
        *(("keyword", *pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)),
    ]
    return [(kind, name.arg, None if default is None else ast.unparse(default)) for kind, name, default in pairs]


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small AWQ checkpoint, block after block, as in a notebook."""
    write_case("awq-zero-points", tmp_path / "tiny-llama-awq")
    monkeypatch.chdir(tmp_path)
    example = sections(DOCS / "reference" / "python.md", 2)["An example"]
    names: dict[str, Any] = {}
    for block in code_blocks(example):
        exec(compile(block, "python.md", "exec"), names)
    assert not names["verification"].problems
    assert "use --format lut" in capsys.readouterr().out


def printed_keys(value: Any) -> set[str]:
    """Return the keys of a JSON document, but for those that are names of layers, numbers, or said in words."""
    if isinstance(value, list):
        return set().union(*map(printed_keys, value))
    if not isinstance(value, dict):
        return set()
    below = (printed_keys(item) for key, item in value.items() if key != "settings")
    return {key for key in value if re.fullmatch(r"[A-Za-z]\w*", key)}.union(*below)


def check_keys(arguments: list[str], titles: list[str], allowed: Collection[str] = ()) -> None:
    """Run a command and compare what it prints with sections of the reference; allowed: keys that need not be there."""
    result = CliRunner().invoke(main, arguments)
    section = "\n".join(JSON[title] for title in titles)
    described = set(re.findall(r"`([A-Za-z]\w*)`", section))
    printed = printed_keys(json.loads(result.stdout))
    assert printed - described == set(), arguments[0]
    first_cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) - printed - set(allowed) == set(), arguments[0]


def test_json_keys_of_samples_are_in_the_reference(shared: Path, tmp_path: Path) -> None:
    """The same of the command that needs a tokenizer."""
    pytest.importorskip("transformers", reason="the extra `quantize` is not installed")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}), encoding="utf-8")
    model = str(shared / "models" / "llama-31m-bf16")
    check_keys(["samples", model, "--data", str(data), "--mask", "template", "--json"], ["w4a8 samples"])


def test_json_keys_of_evaluate_are_in_the_reference(tmp_path: Path) -> None:
    """The same of the command that needs servers; with failures, and with log-probabilities."""
    pytest.importorskip("openai", reason="the extra `evaluate` is not installed")
    prompts = tmp_path / "prompts.jsonl"
    line = {"prompt": "a b", "checks": [{"type": "contains", "value": "b"}], "tags": ["t"]}
    prompts.write_text(json.dumps(line) + "\n" + json.dumps({"prompt": "fails"}), encoding="utf-8")
    behaviour = Behaviour(
        failure=lambda prompt: 500 if prompt == "fails" else None,
        token_ids=True,
        logprobs=lambda ids: [None, *({str(token): {"logprob": -1.0}} for token in ids[1:])],
    )
    with chat_server(behaviour) as url:
        sides = ["--baseline", url, "--candidate", url]
        of_directories = {"predicted", "weight_bytes", "kv_bytes_per_token", "unknown"}
        check_keys(["evaluate", *sides, "--prompts", str(prompts), "--json"], ["w4a8 evaluate"], of_directories)


def test_json_keys_are_in_the_reference(tmp_path: Path) -> None:
    """Every key that a command prints is described, and no others."""
    source, out, baseline = (str(tmp_path / name) for name in ("in", "out", "baseline.json"))
    write_case("awq-zero-points", Path(source))
    problem = {"subject", "reason", "remedy"}
    of_both = ["--source", source, "--json"]
    for arguments, titles in (
        (["convert", source, out, "--json"], ["w4a8 convert"]),
        (["inspect", out, "--json"], ["w4a8 inspect"]),
        (["verify", out, *of_both, "--min-sqnr-db", "99"], ["w4a8 verify"]),
        (["report", out, *of_both], ["w4a8 report"]),
        (["check", source, "--write-baseline", baseline, "--json"], ["w4a8 check", "Baselines"]),
    ):
        check_keys(arguments, titles, allowed=problem)
    assert printed_keys(json.loads(Path(baseline).read_text())) <= set(re.findall(r"`(\w+)`", JSON["Baselines"]))


@EVERY_DOCUMENT
def test_relative_links_lead_somewhere(document: Path) -> None:
    """To files that exist, and to headings that they have."""
    text = "\n".join(lines_outside_code(document.read_text(encoding="utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            target, _, anchor = link.partition("#")
            file = document.parent / target if target else document
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link


@EVERY_DOCUMENT
def test_paths_and_names_exist(document: Path) -> None:
    """Paths of the repository, wherever they are named, and names of the package that are given in full."""
    text = document.read_text(encoding="utf-8")
    for found in re.findall(r"(?<![\w./~-])(?:scripts|tests|convert_w4a8|kernels|docs)/[\w./<>*-]*", text):
        path = re.sub(r"<\w+>", "*", found.rstrip("."))
        assert any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), found
    for name in re.findall(r"`(convert_w4a8(?:\.\w+)+)`", text):
        assert pydoc.locate(name) is not None, name


@EVERY_DOCUMENT
def test_nobody_is_told_to_install_by_name(document: Path) -> None:
    """The package is not on the package index, where anybody could claim its name."""
    for arguments in re.findall(r"\binstall ([^`#\n]*)", document.read_text(encoding="utf-8")):
        assert not [word for word in arguments.split() if re.match(r"['\"]?w4a8", word)], arguments


def test_the_two_commands_can_be_run() -> None:
    """The README's scripts are there and executable."""
    scripts = re.findall(r"^    (scripts/\w+\.sh)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert scripts == ["scripts/demo.sh", "scripts/test.sh"]
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)


def test_every_document_is_in_the_index() -> None:
    """docs/README.md leads to all of them."""
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", index)}
    assert {path.resolve() for path in DOCS.rglob("*.md")} - listed == {DOCS / "README.md"}
