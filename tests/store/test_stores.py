"""What every store promises, held against each; and the URIs that name them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.errors import ConfigError
from ffsplit.store.entries import is_safe_path
from ffsplit.store.local import LocalStore
from ffsplit.store.s3 import STORE_RECORD
from ffsplit.store.store import MissingKey, Store, open_store, parse_s3


def test_values_come_back(store: Store, tmp_path: Path) -> None:
    store.put_bytes("a/b", b"one")
    store.put_bytes("a/b", b"two")
    store.put_bytes("empty", b"")
    assert store.get_bytes("a/b") == b"two"
    assert store.get_bytes("empty") == b""
    assert store.exists("a/b") and not store.exists("a") and not store.exists("a/c")


def test_files_travel_whole_both_ways(store: Store, tmp_path: Path) -> None:
    data = bytes(range(256)) * (17 << 12)  # 17 MiB: more than one part of an upload
    source = tmp_path / "source"
    source.write_bytes(data)
    store.put_file("deep/er/file.bin", source)
    assert store.fetch("deep/er/file.bin", tmp_path / "fetched").read_bytes() == data
    chunks = list(store.open_stream("deep/er/file.bin"))
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) <= 1 << 20
    assert list(store.list("")) == ["deep/er/file.bin"]


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("run/commit.json", b"first")
    assert not store.put_if_absent("run/commit.json", b"second")
    assert store.get_bytes("run/commit.json") == b"first"
    assert list(store.list("")) == ["run/commit.json"]


def test_a_missing_key_is_named(store: Store, tmp_path: Path) -> None:
    store.put_bytes("other", b"")
    store.put_bytes("no/such/key", b"")
    for read in (
        store.get_bytes,
        lambda key: store.fetch(key, tmp_path / "fetched"),
        lambda key: list(store.open_stream(key)),
    ):
        with pytest.raises(MissingKey, match="no/such"):
            read("no/such")
        with pytest.raises(MissingKey, match="neither"):
            read("neither")
    assert not [path for path in (tmp_path / "fetched").rglob("*") if path.is_file()]


def test_listing_is_by_directory_and_sorted(store: Store) -> None:
    for key in ("b/z", "b/a/x", "b.txt", "bb/y", "a"):
        store.put_bytes(key, b"")
    assert list(store.list("")) == ["a", "b.txt", "b/a/x", "b/z", "bb/y"]
    assert list(store.list("b")) == list(store.list("b/")) == ["b/a/x", "b/z"]
    assert store.list_directories("") == ["b", "bb"]
    assert store.list_directories("b/") == ["a"]
    assert list(store.list("nowhere")) == store.list_directories("nowhere") == []


def test_deleting_twice_is_no_error_and_spares_the_rest(store: Store) -> None:
    for key in ("run/one/x", "run/one/sub/y", "run/oneness/z", "kept"):
        store.put_bytes(key, b"")
    for _ in range(2):
        store.delete_prefix("run/one/")
    assert list(store.list("")) == ["kept", "run/oneness/z"]
    for _ in range(2):
        store.delete("run/oneness/z")
    assert list(store.list("")) == ["kept"]
    assert store.list_directories("") == []


def test_a_key_cannot_leave_the_root(store: Store) -> None:
    for key in ("", "/x", "../x", "a/../../x", "a//b", "a//", "a\\b", "a\nb", "."):
        with pytest.raises(ValueError, match="is not a valid key"):
            store.put_bytes(key, b"")
        with pytest.raises(ValueError, match="is not a valid key"):
            store.delete_prefix(key)


def test_check_writable_leaves_nothing_but_what_it_found(store: Store) -> None:
    """Which is a local store's own business: it is always the same."""
    record = [STORE_RECORD] if store.uri.startswith("s3://") else []
    store.check_writable()
    assert list(store.list("")) == record
    store.put_bytes("kept", b"")
    store.check_writable()
    assert list(store.list("")) == [*record, "kept"]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "HTTP://host/x", "foo://"])
def test_other_schemes_are_refused_naming_the_supported(uri: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is not a supported store: use s3://bucket/prefix or a local path"
    ):
        open_store(uri)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3://b ucket/x", "names no bucket"),
        ("s3://bucket/a//b", "is not a prefix"),
        ("s3://bucket/../x", "is not a prefix"),
        ("s3://key:hunter2@bucket/x", "takes no credentials"),
        ("s3:/bucket/x", "lacks slashes"),
        ("file:x", "lacks slashes"),
        ("file://host/x", "names no local file"),
        ("file://", "names no local file"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
    ],
)
def test_a_mistaken_uri_is_one_clear_line(uri: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        open_store(uri)
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


def test_local_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert open_store("out/").uri == str(tmp_path / "out")
    assert open_store("file:///a%20b/c/").uri == "/a b/c"
    assert open_store("file://localhost/a").uri == "/a"
    assert open_store("~/out").uri == "/home/somebody/out"
    assert isinstance(open_store("with:colon"), LocalStore)


@given(st.text(max_size=30))
def test_any_text_is_a_store_or_a_config_error(text: str) -> None:
    for uri in (text, "file://" + text):
        try:
            store = open_store(uri)
        except ConfigError:
            continue
        if isinstance(store, LocalStore):
            assert store.uri.startswith("/")
            assert open_store(store.uri).uri == store.uri


@given(st.text(max_size=30))
def test_any_s3_uri_gives_a_usable_bucket_and_prefix_or_a_config_error(rest: str) -> None:
    try:
        bucket, prefix = parse_s3(rest)
    except ConfigError:
        return
    assert bucket and "/" not in bucket
    assert not prefix or is_safe_path(prefix)


@given(st.text(alphabet="ab./\\\n\0\u2028 ~", max_size=12) | st.text(max_size=12))
def test_a_safe_path_stays_inside(path: str) -> None:
    if is_safe_path(path):
        assert Path("/store", path).as_posix() == f"/store/{path}"
        assert ".." not in Path(path).parts
        path.encode()
    else:
        assert (
            not path
            or {"", ".", ".."} & set(path.split("/"))
            or any(character == "\\" or not character.isprintable() for character in path)
        )
