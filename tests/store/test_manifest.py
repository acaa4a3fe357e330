import json
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffsplit.config import JobConfig
from ffsplit.errors import ArtifactError
from ffsplit.store import manifest as module
from ffsplit.store.entries import FileEntry, is_safe_path
from ffsplit.store.manifest import Manifest, manifest_schema
from ffsplit.store.schema import NewerSchema

from .attempts import ATTEMPT, RUN_KEY, from_the_future, make_manifest

DIGEST = "0" * 64
ENTRY: dict[str, Any] = {"path": "a/b", "size_bytes": 1, "sha256": DIGEST}


def test_a_manifest_survives_json() -> None:
    entry = FileEntry(path="a/b", size_bytes=1, sha256=DIGEST)
    manifest = make_manifest(run_key=RUN_KEY, attempt=ATTEMPT, files=(entry,))
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../up", "a/../../b", "a\\b", "", "a//b", "./a", "a/", "a\0b", "a\nb", "\x1b[2J"]
)
def test_an_unsafe_path_is_named(path: str) -> None:
    fields = json.loads(make_manifest(run_key=RUN_KEY, attempt=ATTEMPT).to_json())
    fields["files"] = [{"path": path, "size_bytes": 0, "sha256": DIGEST}]
    with pytest.raises(ArtifactError, match="is not a plain relative path inside the artifact") as caught:
        Manifest.from_json(json.dumps(fields))
    assert repr(path) in str(caught.value)
    assert str(caught.value).isprintable()


@given(st.text(alphabet="ab./\\\n\0 ", max_size=10) | st.text(max_size=20))
def test_only_safe_paths_become_entries(path: str) -> None:
    try:
        entry = FileEntry(path=path, size_bytes=0, sha256=DIGEST)
    except ValidationError:
        assert not is_safe_path(path)
    else:
        assert is_safe_path(path)
        assert FileEntry.model_validate_json(entry.model_dump_json()) == entry


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"text"', "\xff"])
def test_what_is_no_manifest_is_an_artifact_error(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Manifest.from_json(text)


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    with pytest.raises(ArtifactError, match="upgrade ffsplit"):
        Manifest.from_json('{"schema_version": 2}')


def test_a_newer_schema_names_the_version_to_install() -> None:
    with pytest.raises(ArtifactError, match=r"pip install 'ffsplit>=2\.1'"):
        Manifest.from_json('{"schema_version": 2, "ffsplit_version": "2.1"}')
    with pytest.raises(ArtifactError, match=r"upgrade ffsplit$"):
        Manifest.from_json('{"schema_version": 2, "ffsplit_version": "1; rm -rf"}')


@pytest.mark.parametrize("version", ["1.0", "1.7", "1.12"])
def test_a_later_minor_version_is_read_and_its_fields_are_kept(version: str) -> None:
    """Unknown fields stand in every record, and a reader that writes the manifest writes them too."""
    record = make_manifest(run_key=RUN_KEY, attempt=ATTEMPT, files=(FileEntry(**ENTRY),))
    fields = {**from_the_future(record), "schema_version": version}
    manifest = Manifest.from_json(json.dumps(fields))
    assert json.loads(manifest.to_json()) == fields
    assert (manifest.model.id, manifest.files[0].size_bytes) == ("m", 1)
    changed = json.loads(manifest.model_copy(update={"attempt": "f" * 12}).to_json())
    assert changed == fields | {"attempt": "f" * 12}


def test_a_record_that_is_made_here_has_no_unknown_field() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        FileEntry(**ENTRY, mtime=1)


@pytest.mark.parametrize("version", [2, "2", "2.0", "10.3", 3.1])
def test_a_higher_major_version_is_refused_though_it_looks_alike(version: object) -> None:
    fields = json.loads(make_manifest(run_key=RUN_KEY, attempt=ATTEMPT).to_json())
    fields |= {"schema_version": version, "ffsplit_version": "7.0"}
    said = r"manifest\.json has schema \d+; this version reads schema 1.*ffsplit>=7\.0"
    with pytest.raises(NewerSchema, match=said):
        Manifest.from_json(json.dumps(fields))


@pytest.mark.parametrize("version", ["0.9", "01.0", "1", "", None])
def test_a_version_that_nobody_wrote_is_named(version: str | None) -> None:
    fields = json.loads(make_manifest(run_key=RUN_KEY, attempt=ATTEMPT).to_json())
    with pytest.raises(ArtifactError, match=r"manifest\.json: schema_version: "):
        Manifest.from_json(json.dumps(fields | {"schema_version": version}))


def test_it_does_not_hold_the_command_line() -> None:
    """A flag that comes or goes must not decide which version reads a manifest."""
    assert "JobConfig" not in manifest_schema()["$defs"]
    flags = {"out", "address", "runner", "workers", "trust_remote_code", "samples", "fresh", "gate"}
    assert flags < set(JobConfig.model_fields) and not flags & set(Manifest.model_fields)


FIELDS = sorted(Manifest.model_fields)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(FIELDS) | st.text(max_size=5), JSON)
def test_whatever_a_field_holds_is_a_manifest_or_an_artifact_error(field: str, value: object) -> None:
    fields = json.loads(make_manifest(run_key=RUN_KEY, attempt=ATTEMPT).to_json())
    try:
        manifest = Manifest.from_json(json.dumps(fields | {field: value}))
    except ArtifactError as error:
        assert "\n" not in str(error)
    else:
        assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    """Also in a field that this version does not know: written back, it would be another value."""
    fields = json.loads(make_manifest(run_key=RUN_KEY, attempt=ATTEMPT).to_json())
    with pytest.raises(ArtifactError, match="is not a JSON object"):
        Manifest.from_json(json.dumps(fields | {"later": value}))


def test_depth_is_no_crash() -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json("[" * 10**5)


def test_the_documented_schema_is_the_manifests(capsys: pytest.CaptureFixture[str]) -> None:
    """`make docs` writes it."""
    documented = Path(__file__).parents[2] / "docs/manifest.schema.json"
    runpy.run_path(module.__file__, run_name="__main__")
    assert documented.read_text("utf-8") == capsys.readouterr().out
    assert json.loads(documented.read_text("utf-8")) == manifest_schema()
    future = from_the_future(make_manifest(run_key=RUN_KEY, attempt=ATTEMPT, files=(FileEntry(**ENTRY),)))
    jsonschema.validate(future, manifest_schema())
