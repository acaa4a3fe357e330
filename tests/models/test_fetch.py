"""What a user calls a model is found, or one line says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

import ffsplit
from ffsplit.api import calibrate
from ffsplit.errors import ConfigError
from ffsplit.models.fetch import LocatedModel, locate_model
from ffsplit.models.folder import OWN
from ffsplit.store.pull import verify
from tests.small_jobs import LOW_RANK, SmallJob


def refused(model: str, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        locate_model(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_is_itself_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    expected = LocatedModel((tmp_path / "model").resolve(), None)
    assert locate_model(str(tmp_path / "model")) == expected
    monkeypatch.chdir(tmp_path)
    assert locate_model("model") == locate_model("./model") == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/model") == expected


@pytest.mark.parametrize("model", ["", " "])
def test_no_name_is_not_the_working_directory(model: str) -> None:
    """As of a variable that is not set."""
    assert refused(model).startswith("MODEL is empty")


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    assert "--revision is for hub ids" in refused(str(tmp_path), revision="main")


def test_a_revision_of_what_is_in_a_store_is_refused() -> None:
    said = refused("s3://bucket/model", revision="main")
    assert said == "--revision is for hub ids; s3://bucket/model is in a store"


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    assert "is a file" in refused(str(file))


@pytest.mark.parametrize(
    "model", ["./absent", "../absent", "/no/such/folder", "a/b/c", "has space/model", "./a@b"]
)
def test_what_cannot_be_a_hub_id_is_a_missing_directory(model: str) -> None:
    assert refused(model) == f"model directory {model} does not exist"


def test_an_artifact_is_a_model_wherever_verify_finds_it(small_job: SmallJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = ffsplit.compress(small_job.config(out))
    attempt = out / manifest.run_key / manifest.attempt
    for uri in (out, out / manifest.run_key, attempt, f"file://{out}", f"file://{attempt}"):
        assert verify(str(uri)).ok
        assert locate_model(str(uri)) == LocatedModel(attempt.resolve(), None)
    again = ffsplit.compress(small_job.config(tmp_path / "again", model=str(out), keep=0.25))
    assert again.layers[0].layout.num_neurons < manifest.layers[0].layout.num_neurons
    assert {(each.path, each.reason) for each in again.model.left_out} == {
        ("manifest.json", OWN),
        ("report.html", OWN),
        ("stats/neurons.parquet", OWN),
    }
    assert again.model.id == manifest.model.id
    assert verify(str(tmp_path / "again")).ok


def test_an_artifact_that_is_no_ordinary_model_is_told(small_job: SmallJob, tmp_path: Path) -> None:
    recipe = small_job.recipe(heavy_share=0.5, step=LOW_RANK)
    ffsplit.compress(small_job.config(tmp_path, recipe=recipe))
    with pytest.raises(ConfigError, match=r"already compressed or quantized \(ffsplit .*start from"):
        ffsplit.compress(small_job.config(tmp_path / "again", model=str(tmp_path)))


def test_a_place_of_runs_without_a_model(small_job: SmallJob, tmp_path: Path) -> None:
    calibrate(small_job.config(tmp_path))
    assert refused(str(tmp_path)).startswith(f"{tmp_path} holds no artifact: only statistics are committed")


def test_a_hub_id_without_the_hub_says_both() -> None:
    message = refused("nobody/no-such-model")
    assert message.startswith("model nobody/no-such-model: no such directory, and not fetched from the hub (")


def test_a_snapshot_in_the_cache_is_found_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id resolves to the cached snapshot, whose folder is the revision, without the network."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = locate_model("someone/model")
    assert found.revision == revision
    assert found.directory.samefile(snapshot)
