"""The documents say what the program does: commands, options, links."""

import os
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from convert_w4a8.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("name", sorted(main.commands))
def test_command_has_help_and_is_in_the_readme(name: str) -> None:
    """Every command explains itself and every option, and the README names them."""
    command = main.commands[name]
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert command.help
    assert re.search(rf"`w4a8 {name}\b|w4a8-{name}|w4a8 {name} ", README)
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "version":
            assert parameter.help, parameter.name
            assert re.search(rf"{parameter.opts[0]}\b", README), parameter.opts[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    """Links between documents, and files that they name as links, exist."""
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_two_commands_can_be_run() -> None:
    """The README's scripts are there and executable."""
    scripts = re.findall(r"^    (scripts/\w+\.sh)", README, re.MULTILINE)
    assert scripts == ["scripts/demo.sh", "scripts/test.sh"]
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)
