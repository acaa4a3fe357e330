"""A tiny attempt to publish: three files and a manifest that lists them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ffsplit.config import Record
from ffsplit.ffn.shapes import FFNShape, ModelShape
from ffsplit.store.commits import Commit, Kind
from ffsplit.store.entries import FileEntry, file_entries
from ffsplit.store.manifest import CalibrationRecord, Compute, Environment, Manifest, SourceModel
from ffsplit.store.publish import Upload
from ffsplit.store.store import Store
from ffsplit.store.transfer import Progress

RUN_KEY = "0123456789abcdef"
ATTEMPT = "0123456789ab"
SHAPE = FFNShape(num_neurons=8, hidden_size=4, gated=False, up_bias=True, down_bias=True)
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "nested/deep/notes.txt": b"notes\n"}


def make_manifest(
    *, run_key: str, attempt: str, kind: Kind = "model", files: tuple[FileEntry, ...] = ()
) -> Manifest:
    return Manifest(
        kind=kind,
        run_key=run_key,
        attempt=attempt,
        created_at="2025-01-01T00:00:00+00:00",
        ffsplit_version="0",
        plain=True,
        seed=0,
        compute=Compute(device="cpu", dtype="float32", threads=1),
        recipe={},
        keep=0.5,
        model=SourceModel(
            id="m",
            revision=None,
            digest="d",
            tokenizer_digest="t",
            model_type="bert",
            architecture="BertModel",
            license=None,
            shape=ModelShape(
                shapes=(SHAPE,), itemsize=4, num_parameters=100, num_parameters_without_embeddings=90
            ),
        ),
        calibration=CalibrationRecord(
            sources=("s",),
            text_digest="d",
            num_rows=1,
            num_tokens=1,
            max_length=1,
            num_shards=1,
            held_out_rows=0,
            held_out_is_disjoint=True,
        ),
        layers=(),
        measurements=None,
        stages=(),
        environment=Environment(versions={}, hardware={}),
        files=files,
    )


def from_the_future(record: Record) -> dict[str, Any]:
    """The JSON of a record as a later minor version writes it: with a field more in every record."""

    def planted(value: Any, written: Any) -> Any:
        if isinstance(value, Record):
            known = {name: planted(getattr(value, name), written[name]) for name in written}
            return known | {"a_later_field": {"nested": [1, "two"]}}
        if isinstance(value, tuple):
            return [planted(*pair) for pair in zip(value, written, strict=True)]
        return written

    return dict(planted(record, record.model_dump(mode="json")))


def write_attempt(
    directory: Path,
    *,
    run_key: str = RUN_KEY,
    attempt: str = ATTEMPT,
    kind: Kind = "model",
    files: dict[str, bytes] | None = None,
    schema_version: str | None = None,
) -> Path:
    """Write an attempt's files and their manifest into a new directory; of a later schema, where given."""
    for name, data in (FILES if files is None else files).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    manifest = make_manifest(run_key=run_key, attempt=attempt, kind=kind, files=file_entries(directory))
    text = manifest.to_json()
    if schema_version is not None:
        text = json.dumps(from_the_future(manifest) | {"schema_version": schema_version})
    (directory / "manifest.json").write_text(text)
    return directory


def publish(
    store: Store, directory: Path, *, run_key: str = RUN_KEY, attempt: str = ATTEMPT, kind: Kind = "model"
) -> Commit:
    """Write an attempt into a directory and publish it."""
    write_attempt(directory, run_key=run_key, attempt=attempt, kind=kind)
    return publish_directory(store, directory, run_key=run_key, attempt=attempt, kind=kind)


def publish_directory(
    store: Store,
    directory: Path,
    *,
    run_key: str = RUN_KEY,
    attempt: str = ATTEMPT,
    kind: Kind = "model",
    progress: Progress | None = None,
) -> Commit:
    """Publish a directory that has its manifest already."""
    with Upload(store, run_key=run_key, attempt=attempt, progress=progress) as upload:
        return upload.commit(directory, kind=kind, move_latest=True)


def contents(store: Store) -> dict[str, str]:
    """Every key of a store and the digest of its value. The link `latest` is no key."""
    keys = (key for key in store.list("") if key != "latest")
    return {key: hashlib.sha256(store.get_bytes(key)).hexdigest() for key in keys}
