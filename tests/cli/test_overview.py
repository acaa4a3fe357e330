"""The overview of commands, their help, the list of recipes, and completion in shells."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ffsplit.cli import main
from ffsplit.cli.commands import COMMANDS
from ffsplit.cli.entry import build_parser
from ffsplit.cli.overview import COMMAND_GROUPS, EXAMPLES, FLAG_GROUPS
from ffsplit.config import Flag, JobConfig
from ffsplit.recipes import shipped_recipes

Captured = pytest.CaptureFixture[str]


def test_every_command_and_every_flag_is_in_one_group() -> None:
    names = [name for group in COMMAND_GROUPS.values() for name in group]
    assert sorted(names) == sorted(COMMANDS) == sorted(EXAMPLES)
    fields = [name for group in FLAG_GROUPS.values() for name in group]
    flags = [
        name
        for name, field in JobConfig.model_fields.items()
        if any(isinstance(each, Flag) for each in field.metadata)
    ]
    assert sorted(fields) == sorted(flags)


@pytest.mark.parametrize("example", [each for examples in EXAMPLES.values() for each in examples])
def test_every_example_parses(example: str) -> None:
    words = shlex.split(
        example.removeprefix('eval "$(').removesuffix(')"').partition(" | ")[0].partition(" > ")[0]
    )
    assert words[0] == "ffsplit" and build_parser().parse_args(words[1:]).title == words[1]


def test_every_flag_and_argument_has_a_help() -> None:
    for command in build_parser()._commands():  # type: ignore[attr-defined]
        unexplained = [action.dest for action in command._actions if not action.help and not action.choices]
        assert unexplained == [], command.prog


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_no_command_shows_all_of_them(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == (0 if arguments else 2)
    printed = capsys.readouterr().out
    for command, examples in EXAMPLES.items():
        assert f"  {command} " in printed and f"$ {examples[0]}\n" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_groups_and_examples_in_80_columns(
    command: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {example}\n" in printed for example in EXAMPLES[command])
    assert max(map(len, printed.splitlines())) <= 80
    assert not re.search(r"\w-$", printed, re.MULTILINE), "a name is torn at its hyphen"
    if command == "compress":
        assert all(f"\n{title}:\n" in printed for title in FLAG_GROUPS)
        assert all(name in printed for name in shipped_recipes())


def test_recipes_are_listed_and_shown(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(shipped_recipes())
    assert max(map(len, lines)) <= 80
    for name in shipped_recipes():
        assert main(["recipes", name]) == 0
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed)["name"] == name
        assert max(map(len, printed.splitlines())) <= 80
    assert main(["recipes", "fats"]) == 2
    assert capsys.readouterr().err == "ffsplit: no shipped recipe is named 'fats', did you mean 'fast'?\n"


@pytest.mark.parametrize(
    ("typed", "expected"), [("ffsplit comp", "compress "), ("ffsplit compress m --kee", "--keep ")]
)
def test_a_shell_completes_commands_and_flags(typed: str, expected: str, tmp_path: Path) -> None:
    """As bash asks: argcomplete answers in the file that it is given."""
    answer = tmp_path / "answer"
    environment = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    environment |= {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_COMP_WORDBREAKS": " "}
    subprocess.run([sys.executable, "-m", "ffsplit.cli"], env={**os.environ, **environment}, check=True)
    assert answer.read_text("utf-8").split("\n")[0].strip() == expected.strip()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capsys: Captured) -> None:
    assert main(["completion", shell]) == 0
    assert "_ARGCOMPLETE" in capsys.readouterr().out
