import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ffsplit.artifacts.entries import FileEntry
from ffsplit.artifacts.manifest import SCHEMA_VERSION, Manifest
from ffsplit.artifacts.paths import is_safe_path
from ffsplit.errors import ArtifactError

from .attempts import ATTEMPT, RUN_KEY, make_manifest

DIGEST = "0" * 64
SAMPLES = Path(__file__).parent / "samples"


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


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("manifest-*.json")), ids=lambda path: path.stem)
def test_a_stored_manifest_of_every_schema_still_loads(sample: Path) -> None:
    manifest = Manifest.from_json(sample.read_bytes())
    assert manifest.run_key == RUN_KEY and len(manifest.files) == 1


def test_there_is_a_sample_of_every_schema() -> None:
    names = {path.name for path in SAMPLES.iterdir()}
    assert names == {f"manifest-{version}.json" for version in range(1, SCHEMA_VERSION + 1)}


FIELDS = sorted(Manifest.model_fields)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
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


def test_depth_is_no_crash() -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json("[" * 10**5)


def test_the_documented_schema_is_the_manifests() -> None:
    """`make docs` writes it."""
    documented = Path(__file__).parents[2] / "docs/manifest.schema.json"
    assert json.loads(documented.read_text("utf-8")) == Manifest.model_json_schema()
