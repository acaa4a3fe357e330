"""From a URI to an artifact: which attempt it names, and a local directory with its files."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from ffsplit.artifacts.digests import sha256_file
from ffsplit.artifacts.local import LocalStore
from ffsplit.artifacts.manifest import MANIFEST_NAME, Manifest
from ffsplit.artifacts.paths import ATTEMPT_ID, RUN_KEY
from ffsplit.artifacts.publish import Commit, latest_commit, list_commits, read_commit
from ffsplit.artifacts.stores import MissingKey, Store, open_store
from ffsplit.errors import ArtifactError, ConfigError

_RUN_URI = re.compile(
    rf"(?P<base>.*)/(?P<run_key>{RUN_KEY.pattern})(/(?P<attempt>{ATTEMPT_ID.pattern}))?", re.DOTALL
)


@dataclass(frozen=True)
class Location:
    """One artifact: the directory `prefix` of a store ("" is the root).

    `commit` is what names it, None for an attempt addressed by its own directory that no commit
    names, such as a copy; run key and attempt are None where the URI does not tell them.
    """

    store: Store
    prefix: str
    run_key: str | None = None
    attempt: str | None = None
    commit: Commit | None = None

    @property
    def uri(self) -> str:
        return f"{self.store.uri.rstrip('/')}/{self.prefix}" if self.prefix else self.store.uri

    def key(self, path: str) -> str:
        """The store's key of a file of the artifact."""
        return f"{self.prefix}/{path}" if self.prefix else path


def locate(uri: str) -> Location:
    """The artifact that a URI names.

    It may be where runs were published (then: the newest model), URI/<run key> (its committed
    attempt), or the directory of one attempt. Raises ConfigError, in one line, when it is none of
    these or the run is not committed; ArtifactError when a commit cannot be understood.
    """
    store = open_store(uri)
    match = _RUN_URI.fullmatch(store.uri)
    if match and (location := _locate_run(match)):
        return location
    if store.exists(MANIFEST_NAME):
        return Location(store, "")
    if commit := latest_commit(store):
        return _committed(store, commit)
    raise ConfigError(_why_not(store, uri))


def _locate_run(match: re.Match[str]) -> Location | None:
    base, run_key, attempt = match["base"], match["run_key"], match["attempt"]
    if base == "s3:/":
        return None  # it is the bucket that looks like a run
    store = open_store(base or "/")
    commit = read_commit(store, run_key)
    if attempt is None:
        return _committed(store, commit) if commit else None
    if commit and commit.attempt == attempt:
        return _committed(store, commit)
    prefix = f"{run_key}/{attempt}"
    if not store.exists(f"{prefix}/{MANIFEST_NAME}"):
        return None
    return Location(store, prefix, run_key=run_key, attempt=attempt)


def _committed(store: Store, commit: Commit) -> Location:
    prefix = f"{commit.run_key}/{commit.attempt}"
    return Location(store, prefix, run_key=commit.run_key, attempt=commit.attempt, commit=commit)


def _why_not(store: Store, uri: str) -> str:
    directories = store.list_directories("")
    if _RUN_URI.fullmatch(store.uri) and any(ATTEMPT_ID.fullmatch(name) for name in directories):
        return f"{uri} holds no artifact: the run is not committed; run it again to finish it"
    if list_commits(store):
        return f"{uri} holds no artifact: only statistics are committed; name one by its /<run key>"
    if any(RUN_KEY.fullmatch(name) for name in directories):
        return f"{uri} holds no artifact: its runs are not committed; run them again to finish them"
    expected = "give the place that runs were published to, its /<run key>, or an attempt's directory"
    return f"{uri} holds no artifact: {expected}"


def read_manifest(location: Location) -> Manifest:
    """The manifest of an artifact, checked against the commit that names it.

    Raises ArtifactError when it is missing, is not a manifest, or is not the one committed.
    """
    return parse_manifest(location, read_manifest_bytes(location))


def read_manifest_bytes(location: Location) -> bytes:
    """The manifest's bytes, whose sha256 is the commit's. Raises ArtifactError."""
    try:
        data = location.store.get_bytes(location.key(MANIFEST_NAME))
    except MissingKey:
        raise ArtifactError(f"{location.uri}: {MANIFEST_NAME} is missing") from None
    if location.commit and hashlib.sha256(data).hexdigest() != location.commit.manifest_sha256:
        raise ArtifactError(f"{location.uri}: {MANIFEST_NAME} is not the one that was committed")
    return data


def parse_manifest(location: Location, data: bytes) -> Manifest:
    """The manifest in these bytes. Raises ArtifactError when it is none, or another attempt's."""
    try:
        manifest = Manifest.from_json(data)
    except ArtifactError as error:
        raise ArtifactError(f"{location.uri}: {error}") from None
    named = (location.run_key or manifest.run_key, location.attempt or manifest.attempt)
    if named != (manifest.run_key, manifest.attempt):
        raise ArtifactError(f"{location.uri}: {MANIFEST_NAME} is of {manifest.run_key}/{manifest.attempt}")
    return manifest


def materialize(uri: str, *, cache: Path | None = None) -> Path:
    """A local directory with the artifact's files: in place, or a download that is kept in a cache.

    A download is verified, file by file, before its directory appears. The cache is `cache`, else
    $FFSPLIT_CACHE, else ~/.cache/ffsplit; the directory is artifacts/<manifest's sha256> in it.
    A directory already there is checked for missing files and wrong sizes only. Raises ConfigError
    as `locate` does, ArtifactError when the artifact is not whole.
    """
    location = locate(uri)
    data = read_manifest_bytes(location)
    manifest = parse_manifest(location, data)
    if isinstance(location.store, LocalStore):
        directory = Path(location.uri)
        if problem := _first_problem(directory, manifest):
            raise ArtifactError(f"{location.uri}: {problem}: publish it again or take another copy")
        return directory
    root = cache or Path(os.environ.get("FFSPLIT_CACHE") or "~/.cache/ffsplit").expanduser()
    target = root.absolute() / "artifacts" / hashlib.sha256(data).hexdigest()
    if target.is_dir():
        if (target / MANIFEST_NAME).is_file() and not _first_problem(target, manifest):
            return target
        shutil.rmtree(target, ignore_errors=True)
    download(location, directory=target)
    return target


def download(location: Location, *, directory: Path) -> Manifest:
    """Copy an artifact into a new directory, which appears only once every sha256 is right.

    Files that the manifest does not list stay behind. A directory that another process put there
    meanwhile is kept. Raises ConfigError when the directory cannot be made or has other content,
    ArtifactError when a file is missing or differs.
    """
    data = read_manifest_bytes(location)
    manifest = parse_manifest(location, data)
    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.partial")
    try:
        if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
            raise ConfigError(f"{directory} exists and is not empty: choose another directory")
        whole = partial / "artifact"
        whole.mkdir(parents=True)
        for entry in manifest.files:
            _copy(location, entry.path, whole=whole, scratch=partial / "fetched")
            if sha256_file(whole / entry.path) != entry.sha256:
                raise ArtifactError(f"{location.uri}: {entry.path} is not what its manifest says")
        (whole / MANIFEST_NAME).write_bytes(data)
        _rename(whole, directory=directory)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}: choose another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _copy(location: Location, path: str, *, whole: Path, scratch: Path) -> None:
    """Put one file into `whole`, by way of `scratch` where the store is remote."""
    target = whole / path
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source = location.store.fetch(location.key(path), scratch)
    except MissingKey:
        raise ArtifactError(f"{location.uri}: {path} is missing") from None
    if source.is_relative_to(scratch):
        source.rename(target)
    else:
        shutil.copyfile(source, target)


def _rename(whole: Path, *, directory: Path) -> None:
    """Let a finished download appear, unless another process was faster with the same one."""
    try:
        whole.rename(directory)
    except OSError:
        theirs = directory / MANIFEST_NAME
        if not theirs.is_file() or theirs.read_bytes() != (whole / MANIFEST_NAME).read_bytes():
            raise


def _first_problem(directory: Path, manifest: Manifest) -> str | None:
    """A file of the manifest that is missing, a link, or of another size in a directory."""
    for entry in manifest.files:
        path = directory / entry.path
        if path.is_symlink() or not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.size_bytes:
            return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size_bytes}"
    return None
