"""From a URI to an artifact: the attempt that it names, and its manifest, checked against the commit."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ffsplit.directories import process_folder
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.store.aliases import read_alias, split_alias, unknown_alias
from ffsplit.store.commits import Commit, latest_commit, list_commits, read_commit
from ffsplit.store.entries import ATTEMPT_ID, LATEST_LINK, MANIFEST_NAME, RUN_KEY, FileEntry
from ffsplit.store.manifest import MAX_MANIFEST_BYTES, Manifest
from ffsplit.store.store import MissingKey, Store, open_store, read_at_most, root_uri

_RUN_URI = re.compile(
    rf"(?P<base>.*)/(?P<run_key>{RUN_KEY.pattern})(/(?P<attempt>{ATTEMPT_ID.pattern}))?", re.DOTALL
)


@dataclass(frozen=True)
class Location:
    """One artifact: the directory `prefix` of a store ("" is the root).

    `commit` is the commit that names it. It is None if the URI is an attempt's directory that no commit
    names, such as a copy. Run key and attempt are None if the URI does not contain them.
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

    The URI may be where runs were published (gives the newest model), URI@<alias> (gives the run in use),
    URI/<run key> (gives its committed attempt), or the directory of one attempt, which `latest` in a
    directory of runs is too. Raises ConfigError, in one line, if it names none of these or the run is not
    committed; ArtifactError if a commit is invalid.
    """
    if named := names_alias(uri):
        return _locate_alias(*named)
    root = _followed(root_uri(uri))
    match = _RUN_URI.fullmatch(root)
    if match and (location := _locate_run(match)):
        return location
    store = open_store(root)
    with ThreadPoolExecutor(1) as pool:
        is_artifact = pool.submit(store.exists, MANIFEST_NAME)
        commit = latest_commit(store)
    if is_artifact.result():
        return Location(store, "")
    if commit:
        return _committed(store, commit)
    raise ConfigError(_why_not(store, uri))


def names_alias(uri: str) -> tuple[Store, str] | None:
    """The store and the alias of PLACE@ALIAS; None for any other place, and for a path that exists."""
    named = split_alias(uri)
    if named is None:
        return None
    if not uri.lower().startswith("s3://") and os.path.lexists(root_uri(uri)):
        return None
    return open_store(named[0]), named[1]


def split_run(uri: str) -> tuple[Store, str | None]:
    """The store in which a place lies, and the run that the place names, if it names one."""
    if named := names_alias(uri):
        return named[0], None
    match = _RUN_URI.fullmatch(root_uri(uri))
    return (open_store(match["base"]), match["run_key"]) if match else (open_store(uri), None)


def _locate_alias(store: Store, alias: str) -> Location:
    change = read_alias(store, alias)
    if change is None or change.run_key is None:
        raise ConfigError(unknown_alias(store, alias))
    commit = read_commit(store, change.run_key)
    if commit is None:
        raise ArtifactError(
            f"{store.uri}@{alias} names run {change.run_key}, which is gone: promote another run"
        )
    return _committed(store, commit)


def _followed(root: str) -> str:
    """The attempt that `latest` links to; any other root as it is."""
    path = Path(root)
    return str(path.parent / os.readlink(path)) if path.name == LATEST_LINK and path.is_symlink() else root


def _locate_run(match: re.Match[str]) -> Location | None:
    base, run_key, attempt = match["base"], match["run_key"], match["attempt"]
    if base == "s3:/":
        return None  # the bucket's name looks like a run key
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
        return f"{uri} holds no artifact: only statistics are committed; add the /<run key> of one"
    if any(RUN_KEY.fullmatch(name) for name in directories):
        return f"{uri} holds no artifact: its runs are not committed; run them again to finish them"
    expected = "give the URI that runs were published to, its /<run key>, or an attempt's directory"
    return f"{uri} holds no artifact: {expected}"


def read_manifest(location: Location) -> Manifest:
    """The manifest of an artifact, checked against the commit that names it.

    Raises ArtifactError when it is missing, is not a manifest, or is not the one committed.
    """
    return parse_manifest(location, read_manifest_bytes(location))


def read_manifest_bytes(location: Location) -> bytes:
    """The manifest's bytes, checked against the commit's sha256. Raises ArtifactError."""
    try:
        data = read_at_most(location.store, location.key(MANIFEST_NAME), MAX_MANIFEST_BYTES)
    except MissingKey:
        raise ArtifactError(f"{location.uri}: {MANIFEST_NAME} is missing") from None
    if location.commit and hashlib.sha256(data).hexdigest() != location.commit.manifest_sha256:
        raise ArtifactError(f"{location.uri}: {MANIFEST_NAME} is not the one that was committed")
    return data


def parse_manifest(location: Location, data: bytes) -> Manifest:
    """The manifest in these bytes, with its place.

    Raises ArtifactError if it is invalid, or belongs to another attempt.
    """
    try:
        manifest = Manifest.from_json(data)
    except ArtifactError as error:
        raise ArtifactError(f"{location.uri}: {error}") from None
    named = (location.run_key or manifest.run_key, location.attempt or manifest.attempt)
    if named != (manifest.run_key, manifest.attempt):
        owner = f"{manifest.run_key}/{manifest.attempt}"
        raise ArtifactError(f"{location.uri}: {MANIFEST_NAME} belongs to {owner}")
    return manifest.at(location.uri)


# The neuron statistics of a published run, which a later run can reuse.

STATISTICS_PATH = "stats/neurons.parquet"


@dataclass(frozen=True)
class PublishedStatistics:
    """An earlier run's statistics: its manifest, and a local file that matches the manifest's digest."""

    uri: str
    manifest: Manifest
    path: Path
    sha256: str


def open_statistics(uri: str) -> PublishedStatistics:
    """The statistics of the run that a URI names: an artifact's, or those of `ffsplit calibrate`.

    If the URI is where runs were published, the newest model's statistics are used. If there is no model,
    the newest statistics are. Raises ConfigError if there are none, ArtifactError if they are incomplete.
    """
    location = _locate(uri)
    manifest = read_manifest(location)
    entry = next((each for each in manifest.files if each.path == STATISTICS_PATH), None)
    if entry is None:
        raise ConfigError(
            f"{uri} holds no neuron statistics: give an artifact, or a run of ffsplit calibrate"
        )
    path = _fetch(location, entry)
    return PublishedStatistics(uri=location.uri, manifest=manifest, path=path, sha256=entry.sha256)


def _locate(uri: str) -> Location:
    try:
        return locate(uri)
    except ConfigError:
        store = open_store(uri)
        commits = list_commits(store)
        if not commits:
            raise
        newest = commits[-1]
        prefix = f"{newest.run_key}/{newest.attempt}"
        return Location(store, prefix, run_key=newest.run_key, attempt=newest.attempt, commit=newest)


def _fetch(location: Location, entry: FileEntry) -> Path:
    try:
        path = location.store.fetch(location.key(entry.path), process_folder())
    except MissingKey:
        raise ArtifactError(f"{location.uri}: {entry.path} is missing") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
        raise ArtifactError(f"{location.uri}: {entry.path} does not match its manifest's sha256")
    return path
