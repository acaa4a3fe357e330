"""What Python callers may give `compress` and `calibrate`."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import ffsplit
from ffsplit import ConfigError, JobConfig
from ffsplit.api import JobFields
from tests.conftest import CheckpointFactory

TEXTS = [f"Text number {number} is about apples, pears and the number {number * 7}." for number in range(24)]
QUICK: dict[str, Any] = {"recipe": "norm-prune", "runner": "serial", "keep": 0.5, "samples": 16}


def test_the_fields_are_those_of_the_config() -> None:
    assert get_type_hints(JobFields).keys() == JobConfig.model_fields.keys()
    for function in (ffsplit.compress, ffsplit.calibrate):
        assert {*JobConfig.model_fields, "tokenizer"} < inspect.signature(function).parameters.keys()


def test_texts_and_paths_are_as_good_as_a_file(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    model = checkpoint_of("bert")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), "utf-8")
    given = ffsplit.compress(model=model, out=tmp_path / "a", calibration=TEXTS, **QUICK)
    read = ffsplit.compress(
        JobConfig(model=str(model), out=str(tmp_path / "b"), calibration=(f"{tmp_path}/texts.txt",), **QUICK)
    )
    assert given.run_key == read.run_key
    assert given.calibration.sources[0].endswith("#text")


def test_a_column_of_a_dataset(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    from datasets import Dataset

    dataset = Dataset.from_dict({"body": TEXTS})
    model = checkpoint_of("bert")
    listed = ffsplit.calibrate(model=model, out=tmp_path / "a", calibration=TEXTS, **QUICK)
    column = ffsplit.calibrate(model=model, out=tmp_path / "b", calibration=dataset["body"], **QUICK)
    assert column.run_key == listed.run_key
    with pytest.raises(ConfigError, match=r"one column of the dataset.* it has 'body'"):
        ffsplit.calibrate(model=model, out=tmp_path / "c", calibration=dataset, **QUICK)


def test_a_model_object(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    folder = checkpoint_of("llama", head="ForCausalLM")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config._name_or_path = "./"  # whose last part is empty
    tokenizer = AutoTokenizer.from_pretrained(folder)
    manifest = ffsplit.compress(
        model=model, tokenizer=tokenizer, out=tmp_path / "out", calibration=TEXTS, plain=True, **QUICK
    )
    compressed = ffsplit.load(str(tmp_path / "out"))
    assert type(compressed) is type(model) and manifest.plain
    ids = tokenizer(TEXTS[:1], return_tensors="pt").input_ids
    assert torch.isfinite(compressed(ids).logits).all()
    assert not [each.path for each in manifest.files if "texts" in each.path]
    with pytest.raises(ConfigError, match=r"needs its tokenizer: compress\(model=model"):
        ffsplit.compress(model=AutoModel.from_pretrained(folder), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kep": 0.5}, "unknown field kep, did you mean 'keep'?"),
        ({"keep": "a third"}, "keep should be a valid number, unable to parse string as a number"),
        ({"keep": "half%"}, "keep must be a number such as 0.35 or 35%, not 'half%'"),
        ({"keep": "350%"}, "keep should be less than or equal to 1, not 350%"),
        ({"max_bytes": "5XB"}, "max_bytes must be a size such as 500MB or 50GB, not '5XB'"),
        ({"keep": 0.5, "max_bytes": 10}, "keep and max_bytes are 2 budgets: give one"),
        ({"model": 7}, "model must be a path, a hub id or a transformers model with its tokenizer, not int"),
        ({"tokenizer": object()}, "tokenizer is for a model object"),
        ({"calibration": []}, "calibration: the list holds no text"),
        ({"calibration": ["a text", 7]}, "calibration: every text must be a string, not int"),
        ({"calibration": ["self:2M"]}, "calibration: 'self:2M' is a source, not a text"),
        ({"calibration": 7}, "calibration cannot be read as texts: 'int' object is not iterable"),
    ],
)
def test_a_mistake_is_a_config_error_that_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        ffsplit.compress(**({"model": "no/such/model", "out": "out"} | fields))
    assert "http" not in str(caught.value) and "--" not in str(caught.value)


def test_a_config_or_fields() -> None:
    config = JobConfig(model="m", out="o")
    with pytest.raises(ConfigError, match="a JobConfig or its fields, not both: keep"):
        ffsplit.compress(config, keep=0.5)
    with pytest.raises(ConfigError, match=r"fields by name such as model=\.\.\., not str"):
        ffsplit.compress("m")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^out is missing$"):
        ffsplit.compress(model="m")


def test_as_people_write_them() -> None:
    config = JobConfig(model=Path("m"), out=Path("o"), keep="35%", memory_per_worker="6GB", gate="size >= 1")
    assert (config.model, config.out, config.keep) == ("m", "o", 0.35)
    assert (config.memory_per_worker, config.gate) == (6_000_000_000, ("size >= 1",))
    assert JobConfig(model="m", out="o", max_bytes="5MB").max_bytes == 5_000_000


def test_the_package_shows_its_public_names() -> None:
    assert {"compress", "calibrate", "JobConfig", "Manifest", "ConfigError", "load"} < {*dir(ffsplit)}
    assert not [name for name in dir(ffsplit) if name.startswith("_") and name != "__version__"]
    code = "import sys, ffsplit; ffsplit.compress; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_manifest_prints_and_loads(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = ffsplit.compress(model=checkpoint_of("bert"), out=out, calibration=TEXTS, **QUICK)
    text = str(manifest)
    assert text == repr(manifest) and 8 <= len(text.splitlines()) <= 12
    assert "75.3 kB -> 37.0 kB" in text and "44,576 -> 35,021" in text
    for part in ("norm-prune, --keep 0.5", "not scored on a task", "transformers alone", manifest.run_key):
        assert part in text and part in manifest._repr_html_()
    assert manifest.uri is not None and manifest.uri in text
    assert type(manifest.load()).__name__ == "BertModel"
    assert manifest.report().startswith("<!DOCTYPE html>") and "<iframe" in manifest.report()._repr_html_()
    assert ffsplit.verify(manifest.path or "").problems == ()
    copy = ffsplit.pull(out, str(tmp_path / "copy"))
    assert type(ffsplit.load(copy)).__name__ == "BertModel"
    unpublished = type(manifest).from_json(manifest.to_json())
    assert "not published" in str(unpublished)
    with pytest.raises(ConfigError, match="was not published"):
        unpublished.load()


def test_a_sentence_transformer_in_memory(checkpoint_of: CheckpointFactory, tmp_path: Path) -> None:
    """It has its tokenizer and modules: the result is such a folder too."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(checkpoint_of("bert")), device="cpu")
    manifest = ffsplit.compress(model=encoder, out=tmp_path / "out", calibration=TEXTS, **QUICK)
    assert manifest.calibration.sources[0].startswith("texts-")
    compressed = SentenceTransformer(str(tmp_path / "out" / "latest"), device="cpu")
    assert compressed.encode(TEXTS[:2]).shape == encoder.encode(TEXTS[:2]).shape
