"""Where a result is and how it is loaded: `latest`, the last line of a run, the manifest, the card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import AutoModel, AutoModelForCausalLM

import ffsplit
from ffsplit.cli import main
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from tests.conftest import CheckpointFactory
from tests.small_jobs import LOW_RANK, SmallJob

IDS = torch.arange(6, 30).view(2, 12)
Captured = pytest.CaptureFixture[str]


def run(job: SmallJob, out: Path | str, *more: str) -> list[str]:
    return ["compress", *job.arguments(out, "--runner", "serial", *more)]


def pasted(line: str) -> Any:
    """The model that a pasted line of Python leaves in `model`."""
    names: dict[str, Any] = {}
    exec(line, names)
    return names["model"]


def card_of(out: Path) -> tuple[dict[str, Any], str, str]:
    """The front matter of a result's card, its body and its code."""
    _, front, body = (out / "latest" / "README.md").read_text("utf-8").split("---\n", 2)
    code = re.findall(r"```python\n(.*?)\n```", body, re.DOTALL)[0]
    return yaml.safe_load(front), body, code


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS)[0]
        return found


@pytest.fixture
def llama_job(tmp_path: Path, checkpoint_of: CheckpointFactory) -> SmallJob:
    return SmallJob(tmp_path, checkpoint_of("llama", head="ForCausalLM"))


def test_an_encoder_loads_from_latest(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = ffsplit.compress(small_job.config(tmp_path / "out"))
    latest = tmp_path / "out" / "latest"
    loaded = [ffsplit.load(str(latest)), AutoModel.from_pretrained(latest)]
    loaded.append(AutoModel.from_pretrained(manifest.path))
    expected = outputs(ffsplit.load(str(tmp_path / "out" / manifest.run_key)))
    assert all(torch.equal(outputs(each), expected) for each in loaded)
    assert (latest / "manifest.json").samefile(manifest.path / "manifest.json")  # type: ignore[operator]


def test_a_sentence_encoder_loads_from_latest(
    small_job: SmallJob, checkpoint_of: CheckpointFactory, tmp_path: Path, capsys: Captured
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(str(checkpoint_of("bert")), max_seq_length=20)
    SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), "mean")]).save_pretrained(
        str(tmp_path / "sentences")
    )
    job = SmallJob(tmp_path, tmp_path / "sentences")
    assert main(run(job, tmp_path / "out")) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "from sentence_transformers import SentenceTransformer; "
        f'model = SentenceTransformer("{tmp_path}/out/latest")'
    )
    embeddings = SentenceTransformer(str(tmp_path / "out" / "latest")).encode(["the time"])
    assert (pasted(line).encode(["the time"]) == embeddings).all() and embeddings.shape == (1, 32)
    front, _, code = card_of(tmp_path / "out")
    assert front["library_name"] == "sentence-transformers"
    assert "SentenceTransformer(directory)" in code


@pytest.mark.parametrize("plain", [True, False])
def test_the_last_line_loads_a_language_model(
    llama_job: SmallJob, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = llama_job.recipe() if plain else llama_job.recipe(heavy_share=0.5, step=LOW_RANK)
    assert main([*run(llama_job, "out/mine"), "--recipe", recipe]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == ("" if plain else "import ffsplit; ") + (
        "from transformers import AutoModelForCausalLM; "
        'model = AutoModelForCausalLM.from_pretrained("out/mine/latest")'
    )
    model = pasted(line)
    assert type(model) is transformers.LlamaForCausalLM
    assert torch.equal(outputs(model), outputs(AutoModelForCausalLM.from_pretrained("out/mine/latest")))


def test_the_last_line_loads_this_result_not_a_newer_one(
    small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    first = ffsplit.compress(small_job.config(out))
    second = ffsplit.compress(small_job.config(out, keep=0.25))
    capsys.readouterr()
    assert main(run(small_job, out)) == 0
    captured = capsys.readouterr()
    assert "committed already" in captured.err
    model = pasted(captured.out.splitlines()[-1])
    width = model.config.intermediate_size
    assert width == AutoModel.from_pretrained(first.path).config.intermediate_size
    assert width > AutoModel.from_pretrained(out / "latest").config.intermediate_size
    assert (out / "latest").resolve() == second.path


def test_the_last_line_of_home_and_of_a_url(
    small_job: SmallJob, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ffsplit knows `~` and file://: others get the path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in ("~/out", f"file://{tmp_path}/out"):
        assert main(run(small_job, out)) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith(f'("{tmp_path}/out/latest")')
        assert pasted(line).config.model_type == "bert"


def test_statistics_have_no_line(small_job: SmallJob, tmp_path: Path, capsys: Captured) -> None:
    given = ["calibrate", str(small_job.model), "--out", str(tmp_path / "out"), "--runner", "serial"]
    given += ["--calibration", str(small_job.text), "--samples", "40", "--recipe", small_job.recipe()]
    assert main(given) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("report: ")
    assert not (tmp_path / "out" / "latest").exists()


@pytest.mark.s3
def test_a_bucket_has_no_latest_and_a_line_all_the_same(
    small_job: SmallJob, s3_uri: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFSPLIT_CACHE", str(tmp_path / "cache"))
    assert main(run(small_job, s3_uri)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    manifest = ffsplit.compress(small_job.config(s3_uri))
    assert manifest.uri == f"{s3_uri}/{manifest.run_key}/{manifest.attempt}" and manifest.path is None
    assert line == f'import ffsplit; model = ffsplit.load("{manifest.uri}")'
    assert pasted(line).config.model_type == "bert"
    roots = {key.split("/")[0] for key in open_store(s3_uri).list("")}
    assert roots == {manifest.run_key, "latest.json", "index.json", ".ffsplit"}


def test_a_manifest_says_where_it_is(small_job: SmallJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = ffsplit.compress(small_job.config(out))
    assert manifest.path == out / manifest.run_key / manifest.attempt
    assert manifest.uri == str(manifest.path) and verify(manifest.uri).ok
    again = ffsplit.compress(small_job.config(out))
    assert again == manifest and again.path == manifest.path
    text = (manifest.path / "manifest.json").read_text()
    assert str(tmp_path) not in text and ffsplit.Manifest.from_json(text).path is None


def test_latest_is_a_model_to_compress_again(small_job: SmallJob, tmp_path: Path) -> None:
    ffsplit.compress(small_job.config(tmp_path / "out"))
    again = small_job.config(tmp_path / "again", model=str(tmp_path / "out" / "latest"))
    assert ffsplit.compress(again).model.id == ffsplit.compress(small_job.config(tmp_path / "out")).model.id


@pytest.mark.parametrize("out", ["latest", "latest/below"])
def test_no_run_is_published_into_latest(
    small_job: SmallJob, tmp_path: Path, out: str, capsys: Captured
) -> None:
    ffsplit.compress(small_job.config(tmp_path / "out"))
    capsys.readouterr()
    assert main(run(small_job, tmp_path / "out" / out)) == 2
    err = capsys.readouterr().err
    assert "lies in a published attempt" in err and err.count("\n") == 1


@pytest.mark.parametrize("out", ["hf://org/name", "hf:org/name", "HF://org/name"])
def test_the_hub_is_no_out(small_job: SmallJob, capsys: Captured, out: str, tmp_path: Path) -> None:
    assert main(run(small_job, out)) == 2
    err = capsys.readouterr().err
    assert "`ffsplit push URI org/name`" in err and err.count("\n") == 1


# The model card


def ran(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> str:
    """What a card's code prints, run as it is in the card's directory."""
    monkeypatch.chdir(directory)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


CODE: list[tuple[str, str, str, str]] = [
    ("llama", "ForCausalLM", "AutoModelForCausalLM", r"\S"),
    ("bert", "", "AutoModel", r"torch.Size\(\[1, \d+, 32\]\)"),
    ("bert", "ForSequenceClassification", "AutoModelForSequenceClassification", r"LABEL_[01]\n"),
    ("bert", "ForMaskedLM", "AutoModelForMaskedLM", r"torch.Size\(\[1, \d+, 200\]\)"),
]


@pytest.mark.parametrize(("family", "head", "loader", "expected"), CODE)
def test_the_cards_code_runs_as_printed(
    checkpoint_of: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    family: str,
    head: str,
    loader: str,
    expected: str,
) -> None:
    job = SmallJob(tmp_path, checkpoint_of(family, head=head))
    manifest = ffsplit.compress(job.config(tmp_path / "out"))
    assert manifest.model.loading_class == loader
    front, _, code = card_of(tmp_path / "out")
    assert f"{loader}.from_pretrained(directory)" in code and front["library_name"] == "transformers"
    printed = ran(code, tmp_path / "out" / "latest", monkeypatch, capsys)
    assert re.search(expected, printed), printed


def test_the_cards_code_runs_where_it_needs_ffsplit(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    recipe = small_job.recipe(heavy_share=0.5, step=LOW_RANK)
    ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe))
    _, body, code = card_of(tmp_path / "out")
    assert code.startswith("import ffsplit") and "without `import ffsplit` the load fails" in body
    assert "torch.Size([1, " in ran(code, tmp_path / "out" / "latest", monkeypatch, capsys)


@pytest.fixture
def source_job(small_job: SmallJob, tmp_path: Path) -> Callable[[str], SmallJob]:
    """Makes jobs of a model with a card."""

    def make(card: str) -> SmallJob:
        model = Path(shutil.copytree(small_job.model, tmp_path / "source"))
        (model / "README.md").write_text(card, "utf-8")
        return SmallJob(tmp_path, model)

    return make


SOURCE = """\
---
language: [en, no]
license: other
license_name: some-license
license_link: LICENSE
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: someone/else
base_model_relation: merge
datasets:
- squad
- org/pairs
tags:
- feature-extraction
- onnx
- ffsplit
model-index: [{name: x}]
---
# A model

## Usage
Call it.

## Intended uses & limitations
For sentences, not for books.

### Bias
It was trained on tests.

```python
# Limitations of comments: none is a heading
```

## Training
Long.

## Out-of-Scope Use

[More Information Needed]
"""


def test_the_card_carries_over_what_holds_for_the_result(
    source_job: Callable[[str], SmallJob], tmp_path: Path
) -> None:
    ffsplit.compress(source_job(SOURCE).config(tmp_path / "out"))
    front, body, _ = card_of(tmp_path / "out")
    assert front == {
        "license": "other",
        "library_name": "sentence-transformers",
        "language": ["en", "no"],
        "license_name": "some-license",
        "license_link": "LICENSE",
        "pipeline_tag": "sentence-similarity",
        "datasets": ["squad", "org/pairs"],
        "tags": ["feature-extraction", "ffsplit", "compressed"],
    }, "a local folder is no base model, and the original's base is not this model's"
    use = body[body.index("## Intended use and limits") :]
    assert "For sentences, not for books." in use and "#### Bias\nIt was trained on tests." in use
    assert "Long." not in body and "Call it." not in body and "More Information Needed" not in body


def test_the_card_names_text_hardware_and_figures(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", calibration=("builtin:text",)))
    _, body, _ = card_of(tmp_path / "out")
    assert "tokens of everyday sentences and Python's documentation (`builtin:text`)" in body
    processor = str(manifest.environment.hardware["processor"])
    assert f"Measured on {processor}, " in body and "; cpu, float32, 1 thread, torch " in body
    assert manifest.measurements is not None
    assert manifest.measurements.hardware == manifest.environment.hardware, "the driver measured itself"
    cosine = manifest.measurements.fidelity["pooled_cosine"]
    assert f"| pooled cosine, between the two | | {cosine:.5f} | |" in body
    assert "| forward 1 x 8, p50 ms |" in body
