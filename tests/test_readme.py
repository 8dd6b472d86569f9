"""The README and the docs say what is so."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dmq_export.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_prose_exist(document: Path) -> None:
    for name in re.findall(
        r"`((?:bench|docs|tests|examples|calib|engines|dmq_export)/[\w./-]+)`", document.read_text()
    ):
        assert (ROOT / name).exists(), name


def test_there_are_exactly_two_set_up_commands() -> None:
    commands = re.findall(r"<!-- (set-up|tests) -->\n```sh\n(.*?)```", README, re.S)
    assert [name for name, _ in commands] == ["set-up", "tests"]
    for _, command in commands:
        assert command.count("\n") == command.count("\\\n") + 1  # one line, however it is wrapped


def test_every_command_line_in_the_readme_is_accepted() -> None:
    """Options and choices are parsed; nothing runs, because each ends with -h."""
    lines = [line for line in README.splitlines() if line.startswith("dmq-export ")]
    assert len(lines) >= 4
    for line in lines:
        arguments = line.partition("#")[0].split()[1:]
        result = CliRunner().invoke(main, [*arguments, "-h"])
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_every_option_of_the_readme_exists() -> None:
    helps = "".join(CliRunner().invoke(main, [name, "-h"]).output for name in main.commands)
    for option in set(re.findall(r"`(--[a-z-]+)", README)):
        assert re.search(rf"{option}\b", helps), option
