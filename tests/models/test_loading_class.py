"""The class that a card and a run's last line name loads the model as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from ffsplit.models.load_options import loading_class
from tests.tiny_models import CAUSAL, ENCODERS, FAMILIES, model_class

HEADS = ("", "ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
CASES = [
    (family, head)
    for family in (*ENCODERS, *CAUSAL)
    for head in HEADS
    if hasattr(transformers, f"{FAMILIES[family][0]}{head or 'Model'}")
]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_it_builds_the_class_that_was_compressed(family: str, head: str, tmp_path: Path) -> None:
    cls = model_class(family, head)
    name = loading_class(cls.__name__, model_type=family, where=tmp_path)
    assert name == f"Auto{head or 'Model'}".replace("AutoFor", "AutoModelFor")
    with torch.device("meta"):
        assert type(getattr(transformers, name).from_config(cls.config_class(num_hidden_layers=1))) is cls


@pytest.mark.parametrize(
    ("class_name", "model_type", "expected"),
    [
        ("BartForConditionalGeneration", "bart", "AutoModelForSeq2SeqLM"),
        ("T5ForConditionalGeneration", "t5", "AutoModelForSeq2SeqLM"),
        ("WhisperForConditionalGeneration", "whisper", "AutoModelForSpeechSeq2Seq"),
        ("CLIPModel", "clip", "AutoModel"),
        ("BertForPreTraining", "bert", "AutoModelForPreTraining"),
        ("DPRContextEncoder", "dpr", "DPRContextEncoder"),
        ("", "bert", "AutoModel"),
    ],
)
def test_others(class_name: str, model_type: str, expected: str, tmp_path: Path) -> None:
    assert loading_class(class_name, model_type=model_type, where=tmp_path) == expected


def test_a_models_own_code_names_its_auto_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.MyModel"}}'
    )
    assert loading_class("MyModel", model_type="mine", where=tmp_path) == "AutoModelForCausalLM"
