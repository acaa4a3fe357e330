"""A run whose model, calibration text, resume state and artifact are all in a store."""

import pickle
import shutil
from pathlib import Path

import pytest

import ffsplit
from ffsplit.cli import main
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import locate_model
from ffsplit.store.cache import StoredFiles, fetch_file, stored_files
from ffsplit.store.entries import file_entries
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from tests.small_jobs import SmallJob, digests

from .test_artifact import cache

__all__ = ["cache"]
pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]


def test_everything_is_in_the_store(small_job: SmallJob, s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    for path in small_job.model.iterdir():
        store.put_file(f"model/{path.name}", path)
    store.put_file("text.txt", small_job.text)
    config = small_job.config(f"{s3_uri}/out", model=f"{s3_uri}/model", calibration=(f"{s3_uri}/text.txt",))
    manifest = ffsplit.compress(config)
    assert verify(f"{s3_uri}/out").ok and manifest.model.id == f"{s3_uri}/model"
    local = ffsplit.compress(small_job.config(tmp_path / "out"))
    assert local.run_key == manifest.run_key
    assert [entry for entry in local.files if entry.path.endswith(".safetensors")] == [
        entry for entry in manifest.files if entry.path.endswith(".safetensors")
    ]
    assert digests(tmp_path / "out", "*.safetensors")
    assert type(ffsplit.load(f"{s3_uri}/out")).__name__.startswith("Bert")
    assert main(["inspect", f"{s3_uri}/model"]) == 0
    assert main(["report", f"{s3_uri}/out", "--out", str(tmp_path / "page.html")]) == 0


def test_a_model_in_a_store_is_what_a_local_folder_is(
    small_job: SmallJob, s3_uri: str, tmp_path: Path
) -> None:
    """Sub-folders included, and without what no artifact keeps, which is named all the same."""
    store, folder = open_store(s3_uri), Path(shutil.copytree(small_job.model, tmp_path / "model"))
    left_out = ["pytorch_model.bin", "onnx/model.onnx", ".git/config"]
    for name in (*left_out, "2_Dense/config.json", "additional_chat_templates/a b.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(f"model/{path.relative_to(folder).as_posix()}", path)
    store._client.put_object(Bucket=store._bucket, Key=f"{store._base}model/marker/", Body=b"")
    found, here = locate_model(f"{s3_uri}/model"), open_checkpoint(folder)
    assert found.stored is not None
    assert tuple(entry.path for entry in found.stored.files) == here.folder.files.wanted
    assert [each.path for each in found.left_out] == [".git/", "onnx/", "pytorch_model.bin"]
    assert {each.path for each in here.folder.files.left_out} == {each.path for each in found.left_out}
    assert open_checkpoint(found.directory).tokenizer_digest() == here.tokenizer_digest()
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", model=f"{s3_uri}/model"))
    assert [each.path for each in manifest.model.left_out] == [".git/", "onnx/", "pytorch_model.bin"]
    local = ffsplit.compress(small_job.config(tmp_path / "out", model=str(folder)))
    assert local.run_key == manifest.run_key


def test_no_model_in_a_store_is_told_before_it_is_fetched(s3_uri: str, cache: Path) -> None:
    store = open_store(s3_uri)
    for name in ("lora/adapter_config.json", "lora/adapter_model.bin", "bins/config.json", "bins/model.bin"):
        store.put_bytes(name, b"{}")
    for folder, said in (("lora", "is an adapter"), ("bins", "holds only pickled weights")):
        with pytest.raises(ConfigError, match=said):
            locate_model(f"{s3_uri}/{folder}")
    assert not list(cache.rglob("model.bin")) and not list(cache.rglob("adapter_model.bin"))


def test_a_place_of_runs_in_a_store_is_a_model(small_job: SmallJob, s3_uri: str, tmp_path: Path) -> None:
    manifest = ffsplit.compress(small_job.config(f"{s3_uri}/out"))
    attempt = f"{s3_uri}/out/{manifest.run_key}/{manifest.attempt}"
    for uri in (f"{s3_uri}/out", f"{s3_uri}/out/{manifest.run_key}", attempt):
        found = locate_model(uri)
        assert found.stored is not None and found.stored.uri == attempt
        layout = manifest.layers[0].layout
        assert open_checkpoint(found.directory).shapes[0].num_neurons == layout.num_neurons


def test_what_is_replaced_is_fetched_again(s3_uri: str, cache: Path) -> None:
    store = open_store(s3_uri)
    store.put_bytes("texts/a.txt", b"one")
    first = fetch_file(f"{s3_uri}/texts/a.txt")
    assert first.read_bytes() == b"one" and first.is_relative_to(cache)
    store.delete("texts/b.txt")
    assert fetch_file(f"{s3_uri}/texts/a.txt") == first
    for data in (b"two", b"six", b"three"):  # of one size and within one second, the first ones
        store.put_bytes("texts/a.txt", data)
        assert fetch_file(f"{s3_uri}/texts/a.txt").read_bytes() == data


def test_every_node_fetches_what_the_driver_described(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_uri)
    contents = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}
    for name, data in (
        contents | {"notes.pdf": b"", "nested/config.json": b"", "a\u202eb.json": b""}
    ).items():
        store._client.put_object(Bucket=store._bucket, Key=store._base + "model/" + name, Body=data)
    described = stored_files(f"{s3_uri}/model", choose=lambda names: {*names} & contents.keys())
    handed_over = pickle.loads(pickle.dumps(described))
    first = described.materialize()
    for node in ("a", "b"):
        monkeypatch.setenv("FFSPLIT_CACHE", str(tmp_path / node))
        directory = handed_over.materialize()
        assert directory.is_relative_to(tmp_path / node) and directory.name == first.name
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == contents
        assert handed_over.materialize() == directory


@pytest.mark.parametrize(
    "change", [b"weights" * 999 + b"changed", b"", None], ids=["same size", "empty", "gone"]
)
def test_a_node_refuses_what_changed_since(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: bytes | None
) -> None:
    store = open_store(s3_uri)
    store.put_bytes("model/model.safetensors", b"weights" * 1000)
    described = stored_files(f"{s3_uri}/model", choose=set)
    store.delete("model/model.safetensors")
    if change is not None:
        store.put_bytes("model/model.safetensors", change)
    monkeypatch.setenv("FFSPLIT_CACHE", str(tmp_path / "node"))
    with pytest.raises(ArtifactError, match=r"s3://runs/.*/model: model\.safetensors"):
        described.materialize()
    assert not list((tmp_path / "node" / "artifacts").iterdir())


def test_files_on_a_shared_disk_are_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    described = StoredFiles(uri=str(tmp_path), files=file_entries(tmp_path))
    assert described.materialize() == tmp_path
    (tmp_path / "config.json").write_bytes(b"{ }")
    with pytest.raises(ArtifactError, match=r"config\.json has 3 bytes instead of 2"):
        described.materialize()


def test_one_content_is_kept_once(s3_uri: str, cache: Path) -> None:
    store = open_store(s3_uri)
    store.put_bytes("one/a.txt", b"text")
    store.put_bytes("two/a.txt", b"text")
    assert fetch_file(f"{s3_uri}/one/a.txt") == fetch_file(f"{s3_uri}/two/a.txt")
    assert len(list(cache.rglob("a.txt"))) == 1
    shutil.rmtree(fetch_file(f"{s3_uri}/one/a.txt").parent)
    assert fetch_file(f"{s3_uri}/one/a.txt").read_bytes() == b"text"


def test_what_is_not_there(s3_uri: str, small_job: SmallJob, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        locate_model(f"{s3_uri}/model")
    for wrong in ("s3://bucket", f"{s3_uri}/nothing.txt"):
        with pytest.raises(ConfigError):
            fetch_file(wrong)
    open_store(s3_uri).put_bytes("text.csv", b"a,b\n1,2\n")
    flags = ["--runner", "serial", "--calibration", f"{s3_uri}/text.csv#c"]
    assert main(["compress", *small_job.arguments(f"{s3_uri}/out", *flags)]) == 2
    error = capsys.readouterr().err
    assert f"{s3_uri}/text.csv" in error and error.count("\n") == 1
