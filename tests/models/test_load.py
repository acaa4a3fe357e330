"""What a load leaves behind, and which class it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils import logging

from ffsplit.models.load import model_class, quiet_transformers


@pytest.mark.parametrize("shown", [True, False])
def test_bars_are_as_they_were_once_a_model_is_loaded(shown: bool) -> None:
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        with quiet_transformers():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize(
    ("auto_map", "class_name", "expected"),
    [
        ({"AutoConfig": "m.C", "AutoModelForCausalLM": "m.Own"}, "", "AutoModelForCausalLM"),
        ({"AutoModel": "m.Base", "AutoModelForCausalLM": "m.Own"}, "", "AutoModel"),
        ({"AutoModel": "m.Base", "AutoModelForCausalLM": "m.Own"}, "Own", "AutoModelForCausalLM"),
        ({"AutoConfig": "m.C"}, "", "AutoModel"),
    ],
)
def test_the_auto_class_of_code_that_a_model_brings(
    tmp_path: Path, auto_map: dict[str, str], class_name: str, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert model_class(class_name, where=tmp_path).__name__ == expected
