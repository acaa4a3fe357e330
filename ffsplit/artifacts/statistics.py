"""The neuron statistics that a published run holds, for a later run to start from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ffsplit.artifacts.commits import list_commits
from ffsplit.artifacts.entries import FileEntry
from ffsplit.artifacts.locate import Location, locate, read_manifest
from ffsplit.artifacts.manifest import Manifest
from ffsplit.artifacts.stores import MissingKey, open_store
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.temporary import process_folder

STATISTICS_PATH = "stats/neurons.parquet"


@dataclass(frozen=True)
class PublishedStatistics:
    """An earlier run's statistics: its manifest, and a local file whose digest is the manifest's."""

    uri: str
    manifest: Manifest
    path: Path
    sha256: str


def open_statistics(uri: str) -> PublishedStatistics:
    """The statistics of the run that a URI names: an artifact's, or those of `ffsplit calibrate`.

    Where runs were published, the newest model's are taken, and the newest of all where there is no
    model. Raises ConfigError when there are none, ArtifactError when they are not whole.
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
        raise ArtifactError(f"{location.uri}: {entry.path} is not what its manifest says")
    return path
