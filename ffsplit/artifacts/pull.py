"""Bring an artifact to this machine: into a directory of one's own, or into the cache."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

from ffsplit.artifacts.cache import Cache
from ffsplit.artifacts.digests import sha256_file
from ffsplit.artifacts.local import LocalStore
from ffsplit.artifacts.locate import Location, locate, parse_manifest, read_manifest_bytes
from ffsplit.artifacts.locks import locked
from ffsplit.artifacts.manifest import MANIFEST_NAME, Manifest
from ffsplit.artifacts.paths import colliding
from ffsplit.artifacts.transfer import Progress, Transfer
from ffsplit.errors import ArtifactError, ConfigError

_FREE_BYTES = 64 << 20
"""Left free on the disk by a download."""


def pull(uri: str, directory: Path | None = None, *, progress: Progress | None = None) -> Path:
    """Bring an artifact into a directory, or into the cache, and return where it is.

    Every sha256 is checked before the directory appears. A directory that holds this very artifact
    already is checked in full and kept. Raises ConfigError as `locate` does and when the directory
    cannot be made or has other content, ArtifactError when the artifact is not whole, StoreError when
    the store fails: the next pull then takes up what has arrived.
    """
    location = locate(uri)
    if directory is None:
        return _cached(location, cache=Cache.open(), progress=progress)
    download(location, directory=directory, progress=progress)
    return directory


def materialize(uri: str, *, cache: Path | None = None) -> Path:
    """A local directory with the artifact's files: in place, or a download that is kept in the cache.

    A download is verified, file by file, before its directory appears; a directory already there is
    checked for missing files and wrong sizes only. Raises ConfigError as `locate` does, ArtifactError
    when the artifact is not whole.
    """
    return _cached(locate(uri), cache=Cache.open(cache), progress=None)


def _cached(location: Location, *, cache: Cache, progress: Progress | None) -> Path:
    data = read_manifest_bytes(location)
    manifest = parse_manifest(location, data)
    if isinstance(location.store, LocalStore):
        directory = Path(location.uri)
        if problem := _first_problem(directory, manifest):
            raise ArtifactError(f"{location.uri}: {problem}: publish it again or take another copy")
        return directory

    def bring(target: Path, staging: Path) -> None:
        _transfer(location, manifest, data, target=target, staging=staging, progress=progress)

    digest = hashlib.sha256(data).hexdigest()
    return cache.get(digest, is_whole=partial(_is_whole, manifest=manifest), bring=bring)


def download(location: Location, *, directory: Path, progress: Progress | None = None) -> Manifest:
    """Copy an artifact into a new directory, which appears only once every sha256 is right.

    Files that the manifest does not list stay behind. Raises as `pull` does.
    """
    data = read_manifest_bytes(location)
    manifest = parse_manifest(location, data)
    directory = directory.absolute()
    digest = hashlib.sha256(data).hexdigest()
    staging = directory.with_name(f".{directory.name}.{digest[:16]}.partial")
    try:
        with locked(staging.with_suffix(".lock")):
            if not _is_there(directory, manifest, data):
                source = _from_cache(location, manifest, digest)
                _transfer(source, manifest, data, target=directory, staging=staging, progress=progress)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}: choose another directory") from error
    return manifest


def _is_there(directory: Path, manifest: Manifest, data: bytes) -> bool:
    """Whether this artifact is in the directory, whole. Raises ConfigError when something else is."""
    if not directory.is_dir() and not directory.is_file() and not directory.is_symlink():
        return False
    if directory.is_dir() and not any(directory.iterdir()):
        return False
    theirs = directory / MANIFEST_NAME
    if not directory.is_dir() or not theirs.is_file() or theirs.read_bytes() != data:
        raise ConfigError(f"{directory} exists and is not empty: choose another directory")
    problem = _first_problem(directory, manifest)
    for entry in manifest.files:
        if not problem and sha256_file(directory / entry.path) != entry.sha256:
            problem = f"{entry.path} differs"
    if problem:
        raise ConfigError(f"{directory} holds this artifact damaged ({problem}): remove it and pull again")
    return True


def _from_cache(location: Location, manifest: Manifest, digest: str) -> Location:
    """The same artifact in the cache, where it is there, else where it was found."""
    if isinstance(location.store, LocalStore):
        return location
    with suppress(ConfigError):
        found = Cache.open().find(digest, is_whole=partial(_is_whole, manifest=manifest))
        if found:
            return Location(LocalStore(found), "", run_key=manifest.run_key, attempt=manifest.attempt)
    return location


def _transfer(
    location: Location,
    manifest: Manifest,
    data: bytes,
    *,
    target: Path,
    staging: Path,
    progress: Progress | None,
) -> None:
    """Fetch every file and let the directory appear. Whatever is not as listed leaves nothing behind."""
    if path := colliding((MANIFEST_NAME, *(entry.path for entry in manifest.files))):
        raise ArtifactError(f"{location.uri}: {path} is listed twice, or only case tells it from another")
    staging.mkdir(parents=True, exist_ok=True)
    _check_space(staging, manifest)
    try:
        whole = Transfer(
            location.store,
            prefix=location.key(""),
            entries=manifest.files,
            staging=staging,
            label=location.uri,
        ).run(progress=progress)
        (whole / MANIFEST_NAME).write_bytes(data)
        whole.rename(target)
    except (ArtifactError, OSError):
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def _check_space(staging: Path, manifest: Manifest) -> None:
    """Raise ConfigError when the files cannot fit, before the first byte is asked for."""
    arrived = sum(path.lstat().st_blocks * 512 for path in staging.rglob("*") if path.is_file())
    needed = sum(entry.size_bytes for entry in manifest.files) - arrived
    free = shutil.disk_usage(staging).free - _FREE_BYTES
    if needed > free:
        shutil.rmtree(staging, ignore_errors=True)
        what = f"the artifact needs {needed:,} bytes more and {max(free, 0):,} are free"
        raise ConfigError(f"{staging.parent}: {what}: choose another directory")


def _is_whole(directory: Path, *, manifest: Manifest) -> bool:
    return (directory / MANIFEST_NAME).is_file() and _first_problem(directory, manifest) is None


def _first_problem(directory: Path, manifest: Manifest) -> str | None:
    """A file of the manifest that is missing, a link, or of another size in a directory."""
    for entry in manifest.files:
        path = directory / entry.path
        if path.is_symlink() or not path.is_file():
            return f"{entry.path} is missing"
        if path.stat().st_size != entry.size_bytes:
            return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size_bytes}"
    return None
