"""The model card, from manifests that are made up: what a hub searches, and what it is called by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from ffsplit.models.source_card import SourceCard, parse_card
from ffsplit.report.card import calibrated_in_words, front_matter, loading_code, loading_line, model_card
from ffsplit.store.manifest import CalibrationRecord, Manifest
from tests.report.conftest import manifest_fields

NONE = SourceCard({})
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"


def manifest_of(**fields: Any) -> Manifest:
    """A made-up manifest; fields of the original are given as in `model__revision`."""
    made = manifest_fields(6) | {"recipe": {"name": "fast", "description": "Drop neurons."}}
    for name, value in fields.items():
        outer, _, inner = name.partition("__")
        made[outer] = made[outer] | {inner: value} if inner else value
    return Manifest.model_validate(made)


def files(*names: str) -> list[dict[str, Any]]:
    return [{"path": name, "size_bytes": 1, "sha256": "0" * 64} for name in names]


def calibration(*sources: str, own_rows: int = 0) -> CalibrationRecord:
    fields = dict(manifest_fields(6)["calibration"])
    fields |= {"sources": sources, "num_rows": 10, "own_rows": own_rows, "num_tokens": 14_600}
    return CalibrationRecord.model_validate(fields)


def test_a_hub_id_is_the_base_model() -> None:
    front = front_matter(manifest_of(), NONE)
    assert (front["base_model"], front["base_model_relation"]) == (HUB_ID, "finetune")
    assert front["library_name"] == "transformers"


@pytest.mark.parametrize("name", ["folder", "org/name"])
def test_a_folder_is_no_base_model_whatever_its_name(name: str) -> None:
    front = front_matter(manifest_of(model__revision=None, model__id=name), NONE)
    assert not {"base_model", "base_model_relation"} & front.keys()


def test_integers_are_a_quantized_model() -> None:
    layers = [dict(layer) for layer in manifest_fields(6)["layers"]]
    integer = {"format": "integer", "num_bits": 8}
    part = {"num_neurons": 512, "up": integer, "down": integer}
    layers[3]["layout"] = {"heavy": part, "light": None, "down_bias": True}
    assert front_matter(manifest_of(layers=layers), NONE)["base_model_relation"] == "quantized"
    linears = {"modules": ("a",), "num_bits": 8, "num_elements": 1, "size_bytes": 1, "original_size_bytes": 4}
    assert front_matter(manifest_of(linears=linears), NONE)["base_model_relation"] == "quantized"


def test_the_front_matter_is_yaml_with_the_originals_types() -> None:
    original = parse_card("---\nlanguage: no\nlicense: [mit, apache-2.0]\ntags: one\n---\n")
    card = model_card(manifest_of(), original=original)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["language"] == "no", "Norwegian, which YAML 1.1 reads as false"
    assert front["license"] == ["mit", "apache-2.0"] and front["tags"] == ["one", "ffsplit", "compressed"]


@pytest.mark.parametrize("value", ["{a: b}", "[[a]]", "", "[]", "!!python/object:os.system x"])
def test_values_that_are_no_text_are_not_carried_over(value: str) -> None:
    front = front_matter(manifest_of(), parse_card(f"---\ndatasets: {value}\nlicense: mit\n---\n"))
    assert "datasets" not in front or isinstance(front["datasets"], str)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("builtin:text", "everyday sentences and Python's documentation (`builtin:text`)"),
        ("builtin:text:0.5", "everyday sentences and Python's documentation (`builtin:text:0.5`)"),
        ("builtin:pydoc", "Python's documentation (`builtin:pydoc`)"),
        (
            "hf:org/pairs:main#text@train",
            "[org/pairs](https://huggingface.co/datasets/org/pairs) (`hf:org/pairs:main#text@train`)",
        ),
        ("hf:imdb#text@train", "[imdb](https://huggingface.co/datasets/imdb) (`hf:imdb#text@train`)"),
        ("mine.csv#text", "`mine.csv#text`"),
    ],
)
def test_text_is_named(source: str, words: str) -> None:
    assert calibrated_in_words(calibration(source)) == f"Calibrated on 14.6\u00a0k tokens of {words}."
    healed = calibrated_in_words(calibration(source), heals=True)
    assert healed == f"Calibrated and healed on 14.6\u00a0k tokens of {words}."


def test_text_of_the_models_own_is_told() -> None:
    own = calibrated_in_words(calibration("self:1M", own_rows=10))
    assert own.endswith("that the original model wrote itself: no data was used.")
    mixed = calibrated_in_words(calibration("self:1M", "mine.txt", own_rows=5))
    assert "50.0\u00a0% was written by the original model itself, the rest is from `mine.txt`." in mixed


def test_the_line_quotes_what_the_path_holds() -> None:
    line = loading_line(manifest_of(), 'out/a "b" \u00fc\\latest')
    names: dict[str, Any] = {}
    exec(
        line.replace("from transformers import AutoModel", "AutoModel = Recorder"),
        {"Recorder": Recorder},
        names,
    )
    assert names["model"] == 'out/a "b" \u00fc\\latest'


class Recorder:
    """Stands in for a class of transformers, which would look for the folder."""

    @staticmethod
    def from_pretrained(place: str) -> str:
        return place


def test_own_code_is_trusted_in_the_line_and_in_the_card() -> None:
    compute = manifest_fields(6)["compute"] | {"trust_remote_code": True}
    manifest = manifest_of(compute=compute)
    assert loading_line(manifest, "here").endswith('from_pretrained("here", trust_remote_code=True)')
    assert loading_line(manifest, "s3://b/k").endswith('ffsplit.load("s3://b/k", trust_remote_code=True)')
    assert loading_code(manifest).count("trust_remote_code=True") == 2


@pytest.mark.parametrize(
    ("names", "reader"),
    [
        (("tokenizer.json",), "AutoTokenizer"),
        (("tokenizer.json", "preprocessor_config.json"), "AutoProcessor"),
        (("model.safetensors",), None),
    ],
)
def test_the_code_makes_inputs_only_where_it_can(names: tuple[str, ...], reader: str | None) -> None:
    code = loading_code(manifest_of(files=files(*names)))
    assert re.findall(r"^\w+ = (Auto\w+)", code, re.MULTILINE) == ["AutoModel", *([reader] if reader else [])]
    assert ("outputs" in code) == (reader == "AutoTokenizer")
    compile(code, "card", "exec")
