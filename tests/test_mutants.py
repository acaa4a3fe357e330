"""The list of mutants fits the package: `make mutants` makes them and runs the tests it names."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, mutated

ROOMS = {
    "store",
    "run",
    "run/stages",
    "ffn",
    "models",
    "calibration",
    "compressors",
    "splitting",
    "healing",
    "runtime",
    "measurement",
    "distributed",
    "report",
    "zoo",
    "recipes",
    "cli",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.new[:40]}")
def test_it_can_be_made_and_its_test_is_there(mutant: Mutant) -> None:
    text = (ROOT / "ffsplit" / mutant.file).read_text("utf-8")
    assert mutated(mutant, text) != text
    file, _, name = mutant.test.partition("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_is_one_in_every_room() -> None:
    assert len(MUTANTS) >= 20
    assert {mutant.file.rpartition("/")[0] for mutant in MUTANTS} >= ROOMS
