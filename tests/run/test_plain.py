"""--plain: what needs ffsplit to load is refused before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffsplit.cli import main
from tests.small_jobs import SmallJob

NOT_PLAIN = {
    "paper": "its layers are not single dense FFNs",
    "svd": "its layers are not single dense FFNs",
    "int8": "it ends with integer weights",
    "search": "its search may give FFNs different widths",
    "energy": "its energy rule may give FFNs different widths",
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_recipe_that_is_not_plain_is_refused(
    name: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"search": {"allocation": "search"}, "energy": {"heavy_energy": 0.5}}
    recipe = small_job.recipe(**made[name]) if name in made else name  # type: ignore[arg-type]
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial", "--recipe", recipe, "--plain")
    before = set(tmp_path.rglob("*"))
    assert main(["compress", *arguments]) == 2
    error = capsys.readouterr().err
    assert "--plain: recipe " in error and NOT_PLAIN[name] in error and error.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_one_that_is_plain_passes(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial", "--plain", "--json")
    assert main(["compress", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["plain"] is True
