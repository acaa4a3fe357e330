"""Every shipped recipe loads, and every mistake in one is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.compressors import DistillCompressor, LowRankCompressor, PruneCompressor
from ffsplit.errors import ConfigError
from ffsplit.recipes import shipped_recipes
from ffsplit.recipes.recipe import Recipe, load_recipe, parse_recipe, recipe_of

GOOD = """\
name: mine
description: A recipe of my own.
heavy_share: 0.5
steps:
  - kind: low_rank
"""


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, where="mine.yaml")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("mine.yaml")
    return message


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_bears_its_own_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.endswith(".") and "\n" not in recipe.description
    assert recipe.keep == {"experts": 0.75, "split": 1}.get(name, 0.3535)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_recipes_that_are_shipped() -> None:
    shipped = [
        "best",
        "demo",
        "experts",
        "fast",
        "flap",
        "int8",
        "norm-prune",
        "paper",
        "refit",
        "split",
        "svd",
        "tiny",
        "whitened-svd",
    ]
    assert list(shipped_recipes()) == shipped
    fit = DistillCompressor(num_steps=400)
    assert load_recipe("refit").steps == load_recipe("fast").steps[:1]
    assert load_recipe("refit").calibration == load_recipe("fast").calibration
    assert load_recipe("int8").calibration == load_recipe("fast").calibration
    assert load_recipe("tiny").calibration == load_recipe("best").calibration
    assert load_recipe("fast").steps == (PruneCompressor(compensation="least_squares"), fit)
    assert load_recipe("fast").refits == load_recipe("int8").refits == (fit,)
    assert load_recipe("best").refits == load_recipe("tiny").refits == ()
    assert load_recipe("paper").steps == load_recipe("svd").steps == (LowRankCompressor(),)
    assert (load_recipe("paper").heavy_share, load_recipe("svd").heavy_share) == (0.5, 0)
    assert load_recipe("paper").score == "mean"
    assert load_recipe("paper").source == "https://arxiv.org/abs/2401.04044"


def test_a_recipe_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine.yaml", "mine.yml"):
        (tmp_path / name).write_text(GOOD)
        assert load_recipe(str(tmp_path / name)).name == "mine"
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml") == parse_recipe(GOOD, where="mine.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe("~/mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("name", "near"), [("fats", "'fast'"), ("papr", "'paper'"), ("norm_prune", "'norm-prune'")]
)
def test_an_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown recipe '{name}', did you mean {near}") as caught:
        load_recipe(name)
    shipped = (
        "best, demo, experts, fast, flap, int8, norm-prune, paper, refit, split, svd, tiny, whitened-svd"
    )
    assert shipped in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_like_no_other_suggests_nothing() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'xyzzy' \(shipped"):
        load_recipe("xyzzy")


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe file .*absent\.yaml does not exist"):
        load_recipe(str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not UTF-8"):
        load_recipe(str(tmp_path / "binary.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.yaml"):
        load_recipe(str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize(
    ("wrong", "path", "near"),
    [
        (GOOD.replace("heavy_share", "heavy_shares"), "heavy_shares", "'heavy_share'"),
        (GOOD + "scores: rms\n", "scores", "'score'"),
        (GOOD + "calibration:\n  sample: 3\n", "calibration.sample", "'samples'"),
        (GOOD + "measurement:\n  latency_pair: 3\n", "measurement.latency_pair", "'latency_pairs'"),
        (GOOD.replace("low_rank", "prune\n    ridg: 1"), "steps.0.prune.ridg", "'ridge'"),
    ],
)
def test_an_unknown_field_is_named_with_a_suggestion(wrong: str, path: str, near: str) -> None:
    message = refused(wrong)
    assert f"unknown field {path}, did you mean {near}?" in message


def test_an_unknown_field_like_no_other() -> None:
    assert refused(GOOD + "xyzzy: 1\n") == "mine.yaml: unknown field xyzzy"


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (GOOD + "keep: 0\n", "keep should be greater than 0, not 0"),
        (GOOD + "keep: 1.5\n", "keep should be less than or equal to 1, not 1.5"),
        (GOOD + "keep: half\n", "keep should be a valid number"),
        (GOOD + "keep: .nan\n", "keep should be a finite number"),
        (GOOD.replace("0.5", "2"), "heavy_share should be less than or equal to 1, not 2"),
        (GOOD + "score: best\n", "score should be 'mean', 'rms' or 'centred', not 'best'"),
        (GOOD + "calibration:\n  samples: 0\n", "calibration.samples should be greater than or equal to 1"),
        (GOOD + "calibration: 5\n", "calibration"),
        (GOOD.replace("  - kind: low_rank", "  []"), "steps"),
        (
            GOOD.replace("  - kind: low_rank", "  - kind: quantize\n  - kind: low_rank"),
            "steps: low_rank works on floating point, so quantize must come after it",
        ),
        (GOOD.replace("low_rank", "quantise"), "quantise"),
        (GOOD.replace("kind: low_rank", "rank: 3"), "kind"),
        (GOOD.replace("low_rank", "prune\n    compensation: some"), "'some'"),
        (GOOD.replace("name: mine\n", ""), "name is missing"),
        (
            GOOD.replace("heavy_share: 0.5\n", ""),
            "exactly one of heavy_share, heavy_fraction and heavy_energy",
        ),
        (GOOD + "heavy_energy: 0.9\n", "heavy_share and heavy_energy is given"),
        (
            GOOD.replace("heavy_share: 0.5", "heavy_fraction: 1.5"),
            "heavy_fraction should be less than or equal",
        ),
        (GOOD + "measurement:\n  latency_shapes: [[1]]\n", "measurement.latency_shapes.0"),
    ],
)
def test_a_bad_value_is_named(wrong: str, expected: str) -> None:
    assert expected in refused(wrong)


@pytest.mark.parametrize(("by", "value"), [("share", 0.5), ("fraction", 0.05), ("energy", 0.9)])
def test_heavy_hitters_by_each_of_three_rules(by: str, value: float) -> None:
    recipe = parse_recipe(GOOD.replace("heavy_share: 0.5", f"heavy_{by}: {value}"), where="mine.yaml")
    assert (recipe.heavy.by, recipe.heavy.value) == (by, value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "3"])
def test_what_is_no_mapping_is_told_the_fields(text: str) -> None:
    message = refused(text)
    assert "must be a YAML mapping" in message and "heavy_share" in message


@pytest.mark.parametrize("text", ["name: [", "name: 'a\nb: c", "\tname: a"])
def test_what_is_no_yaml_says_where(text: str) -> None:
    assert "is not YAML" in refused(text)


@pytest.mark.parametrize("text", ["name: 2026-02-30", "name: " + "[" * 20_000])
def test_whatever_the_parser_raises_is_one_line(text: str) -> None:
    """A day that there is not is a ValueError, what nests too deep a RecursionError."""
    with pytest.raises(ConfigError, match=r"^r\.yaml is not YAML: ") as caught:
        parse_recipe(text, where="r.yaml")
    assert "\n" not in str(caught.value)


def test_a_yaml_file_cannot_make_objects() -> None:
    assert "is not YAML" in refused("name: !!python/object/apply:os.system ['true']\n")


def test_a_recipe_of_a_manifest_that_cannot_be_read_is_one_line() -> None:
    fields = load_recipe("fast").model_dump(mode="json")
    assert recipe_of(fields, where="m") == load_recipe("fast")
    with pytest.raises(ConfigError, match="m: its recipe: unknown field charm: give --recipe"):
        recipe_of(fields | {"charm": 3}, where="m")
