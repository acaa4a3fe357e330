"""What is read of the card that a model brings."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.models.fetch import model_name
from ffsplit.models.source_card import parse_card, read_card


@pytest.mark.parametrize(
    "heading",
    [
        "Intended uses",
        "Intended uses & limitations",
        "Uses",
        "Direct Use",
        "Out-of-Scope Use",
        "Limitations",
        "Misuse",
        "Bias, Risks, and Limitations",
        "Limitations and bias",
        "Ethical considerations",
        "Limits ##",
    ],
)
def test_sections_about_use_and_limits(heading: str) -> None:
    (section,) = parse_card(f"# Model\nIntro.\n## {heading}\nText.\n## Next\nMore.").sections
    assert section == f"### {heading}\nText."


@pytest.mark.parametrize(
    "heading", ["Usage", "How to use", "Use with transformers", "How to get started", "Training", "Because"]
)
def test_other_sections_are_left_to_the_original(heading: str) -> None:
    assert parse_card(f"# Model\n## {heading}\nText.").sections == ()


def test_a_section_ends_with_its_level_and_keeps_what_is_below() -> None:
    card = "# Model\n### Limitations\nA.\n#### Bias\nB.\n```\n# a comment\n```\n### Training\nC.\n# Uses\nD."
    assert parse_card(card).sections == (
        "### Limitations\nA.\n#### Bias\nB.\n```\n# a comment\n```",
        "### Uses\nD.",
    )


@pytest.mark.parametrize("text", ["", "[More Information Needed]", "<!-- Tell\nmore -->", "### Sub\n\n---"])
def test_empty_sections_are_left_out(text: str) -> None:
    assert parse_card(f"## Limitations\n\n{text}\n\n## Next\n").sections == ()


def test_an_artifacts_own_card_is_not_its_originals(tmp_path: Path) -> None:
    assert read_card(tmp_path).fields == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_card(tmp_path).strings("license") == ("mit",)
    (tmp_path / "README.original.md").write_text("---\nlicense: [apache-2.0, mit]\n---\n")
    assert read_card(tmp_path).strings("license") == ("apache-2.0", "mit")


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: mit\n---\n\n# all-MiniLM-L6-v2\nThis is a model\n# Usage\n", "all-MiniLM-L6-v2"),
        ("# org/name #\n", "org/name"),
        ("# A model of many words\n\n# single\n", "model-of-mine/model"),
        ("no title", "model-of-mine/model"),
        (None, "model-of-mine/model"),
    ],
)
def test_a_folder_with_a_generic_name_is_called_as_its_card_is_titled(
    card: str | None, name: str, tmp_path: Path
) -> None:
    directory = tmp_path / "model-of-mine" / "model"
    directory.mkdir(parents=True)
    if card is not None:
        (directory / "README.md").write_text(card)
    assert model_name(str(directory)) == name
    named = directory.rename(directory.with_name("my-encoder"))
    assert model_name(str(named)) == "my-encoder"


def test_a_snapshot_of_the_hub_has_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert model_name(str(snapshot)) == "org/name"
