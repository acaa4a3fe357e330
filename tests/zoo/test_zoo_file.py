"""Zoo files: defaults, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.errors import ConfigError
from ffsplit.zoo.zoo_file import Zoo, load_zoo, parse_zoo

FILE = """\
destination: s3://models/zoo/
max_models_in_flight: 3
defaults:
  recipe: best
  keep: 0.35
  eval: sts:dev.csv
  gate: [fidelity >= 0.98]
models:
  - model: org/small
  - model: org/large
    name: large
    max_bytes: 1000
    recipe: tiny
    gate: []
"""


def parse(text: str) -> Zoo:
    return parse_zoo(text, where="zoo.yaml", name="zoo")


def test_defaults_hold_where_a_model_says_nothing_else() -> None:
    zoo = parse(FILE)
    small, large = zoo.models
    assert (zoo.destination, zoo.max_models_in_flight, zoo.retries) == ("s3://models/zoo", 3, 2)
    assert (small.name, small.job.out, small.job.keep) == ("small", "s3://models/zoo/small", 0.35)
    assert (small.job.eval, small.job.gate) == (("sts:dev.csv",), ("fidelity >= 0.98",))
    assert (large.name, large.job.recipe, large.job.gate) == ("large", "tiny", ())
    assert (large.job.keep, large.job.max_bytes) == (None, 1000)


def test_the_digest_is_of_what_is_asked_for() -> None:
    assert parse(FILE).digest == parse(FILE + "\n# a comment\nretries: 2\n").digest
    assert parse(FILE).digest != parse(FILE.replace("0.35", "0.36")).digest


BAD: dict[str, tuple[str, str, str]] = {
    "no yaml": ("models:", "models: [", "is not valid YAML"),
    "a list": (FILE, "- a", "must be a YAML mapping"),
    "unknown field": ("retries", "retrys: 1", "unknown field retrys, did you mean 'retries'?"),
    "unknown default": ("  keep:", "  keeep:", "defaults: unknown field keeep, did you mean 'keep'?"),
    "unknown field of a model": ("max_bytes", "max_byte", "models[1]: unknown field max_byte, did you mean"),
    "gates": ("  gate: [f", "  gates: [f", "did you mean 'gate'?"),
    "an output of its own": ("    recipe: tiny", "    out: elsewhere", "out cannot be set in a zoo file"),
    "one name twice": (
        "name: large",
        "name: small",
        "models[0] (org/small) and models[1] (org/large) are both",
    ),
    "one name but for case": (
        "name: large",
        "name: Small",
        "are named 'small' and 'Small', and would publish",
    ),
    "one default name": ("org/large\n    name: large", "other/small", "(other/small) are both named 'small'"),
    "one folder's name": ("org/large\n    name: large", "/models/small/", "are both named 'small'"),
    "one model twice": ("org/large\n    name: large", "org/small", "are both named 'small'"),
    "a default name that is given": ("name: large", "name: small", "are both named 'small'"),
    "the name of the page": ("name: large", "name: Index.html", "'Index.html' is not a valid name"),
    "one key twice": ("  keep: 0.35", "  keep: 0.35\n  keep: 0.5", "'keep' is given twice"),
    "no name": ("name: large", "name: ../large", "'../large' is not a valid name"),
    "a name that is taken": ("name: large", "name: batches", "'batches' is not a valid name"),
    "an empty destination": (
        "destination: s3://models/zoo/",
        "destination: ''",
        "destination must not be empty",
    ),
    "no destination": ("destination: s3://models/zoo/", "retries: 1", "destination is missing"),
    "no models": (FILE[FILE.index("models:\n") :], "models: []", "models must not be empty"),
    "no model": ("  - model: org/small", "  - name: small", "models[0] (small): model is missing"),
    "a bad budget": ("keep: 0.35", "keep: 35", "models[0] (small): keep should be less than or equal to 1"),
    "two budgets": ("max_bytes: 1000", "max_bytes: 1000\n    max_parameters: 9", "2 budgets"),
    "a bad gate": ("fidelity >= 0.98", "fidelty >= 0.98", "did you mean 'fidelity'?"),
    "a day that there is not": ("in_flight: 3", "in_flight: 2026-02-30", "is not valid YAML"),
    "none in flight": ("in_flight: 3", "in_flight: 0", "max_models_in_flight should be greater"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_that_says_where(name: str) -> None:
    old, new, expected = BAD[name]
    text = FILE.replace(old, new, 1) if old in FILE else f"{FILE}{new}\n"
    with pytest.raises(ConfigError, match=r"^zoo\.yaml") as caught:
        parse(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"zoo file none\.yaml cannot be read: No such file"):
        load_zoo("none.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"zoo file .*zoo\.yaml is not UTF-8 text"):
        load_zoo(str(tmp_path / "zoo.yaml"))


def test_one_model_may_be_there_twice_under_two_names() -> None:
    twice = parse(FILE.replace("org/large", "org/small"))
    assert [(each.name, each.job.model) for each in twice.models] == [
        ("small", "org/small"),
        ("large", "org/small"),
    ]
    assert len({each.job.out for each in twice.models}) == 2
