"""A run whose model, calibration text, resume state and artifact are all in a store."""

from pathlib import Path

import pytest

import ffsplit
from ffsplit.artifacts.inputs import fetch_directory, fetch_file
from ffsplit.artifacts.stores import open_store
from ffsplit.artifacts.verify import verify
from ffsplit.cli import main
from ffsplit.errors import ConfigError
from tests.small_jobs import SmallJob, digests

from .test_locate import cache

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]


def test_everything_is_in_the_store(small_job: SmallJob, s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    for path in small_job.model.iterdir():
        store.put_file(f"model/{path.name}", path)
    store.put_file("text.txt", small_job.text)
    config = small_job.config(f"{s3_uri}/out", model=f"{s3_uri}/model", calibration=(f"{s3_uri}/text.txt",))
    manifest = ffsplit.compress(config)
    assert verify(f"{s3_uri}/out").ok
    local = ffsplit.compress(small_job.config(tmp_path / "out"))
    assert local.run_key == manifest.run_key
    assert [entry for entry in local.files if entry.path.endswith(".safetensors")] == [
        entry for entry in manifest.files if entry.path.endswith(".safetensors")
    ]
    assert digests(tmp_path / "out", "*.safetensors")
    assert type(ffsplit.load(f"{s3_uri}/out")).__name__.startswith("Bert")
    assert main(["inspect", f"{s3_uri}/model"]) == 0
    assert main(["report", f"{s3_uri}/out", "--out", str(tmp_path / "page.html")]) == 0


def test_what_is_replaced_is_fetched_again(s3_uri: str, cache: Path) -> None:
    store = open_store(s3_uri)
    store.put_bytes("texts/a.txt", b"one")
    first = fetch_file(f"{s3_uri}/texts/a.txt")
    assert first.read_bytes() == b"one" and first.is_relative_to(cache)
    store.delete("texts/b.txt")
    assert fetch_file(f"{s3_uri}/texts/a.txt") == first
    store.put_bytes("texts/a.txt", b"three")
    assert fetch_file(f"{s3_uri}/texts/a.txt").read_bytes() == b"three"


def test_what_is_not_there(s3_uri: str, small_job: SmallJob, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        fetch_directory(f"{s3_uri}/model", suffixes=(".json",))
    for wrong in ("s3://bucket", f"{s3_uri}/nothing.txt"):
        with pytest.raises(ConfigError):
            fetch_file(wrong)
    open_store(s3_uri).put_bytes("text.csv", b"a,b\n1,2\n")
    flags = ["--runner", "serial", "--calibration", f"{s3_uri}/text.csv#c"]
    assert main(["compress", *small_job.arguments(f"{s3_uri}/out", *flags)]) == 2
    error = capsys.readouterr().err
    assert f"{s3_uri}/text.csv" in error and error.count("\n") == 1
