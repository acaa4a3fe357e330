"""Bring an artifact to this machine: into a directory of one's own, or into the cache."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ffsplit.artifacts.cache import Cache
from ffsplit.artifacts.digests import sha256_file
from ffsplit.artifacts.links import LinkedFiles, is_link
from ffsplit.artifacts.local import LocalStore
from ffsplit.artifacts.locate import Location, locate, parse_manifest, read_manifest_bytes
from ffsplit.artifacts.locks import locked
from ffsplit.artifacts.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME, UNLISTED, Manifest
from ffsplit.artifacts.paths import colliding
from ffsplit.artifacts.signing import MAX_SIGNATURE_BYTES, check_key_kind, verify_manifest
from ffsplit.artifacts.stores import MissingKey, Source, read_at_most
from ffsplit.artifacts.transfer import Progress, Transfer, first_problem
from ffsplit.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class _Origin:
    """An artifact as it is brought from somewhere: its manifest's bytes are the committed ones."""

    source: Source
    prefix: str
    label: str
    data: bytes
    manifest: Manifest
    signature: bytes | None
    directory: Path | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def pull(
    uri: str,
    directory: Path | None = None,
    *,
    verify_key: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Bring an artifact into a directory, or into the cache, and return where it is.

    `uri` is what `locate` takes, or a link that `ffsplit share` made. Every sha256 is checked before
    the directory appears. A directory that holds this very artifact already is checked in full and
    kept. With `verify_key`, a public key, nothing unsigned is brought. Raises ConfigError as `locate`
    does and when the directory cannot be made or has other content, ArtifactError when the artifact
    is not whole or not signed, StoreError when the store fails: the next pull then takes up what has
    arrived.
    """
    if verify_key is not None:
        check_key_kind(verify_key, private=False)
    origin = _linked(uri) if is_link(uri) else _located(locate(uri))
    if verify_key is not None:
        if origin.signature is None:
            raise ArtifactError(f"{origin.label} is not signed: do not use it, or pull without --verify-key")
        verify_manifest(origin.data, origin.signature, key=verify_key, label=origin.label)
    if directory is None:
        return _cached(origin, cache=Cache.open(), progress=progress)
    _download(origin, directory=directory, progress=progress)
    return directory


def materialize(uri: str, *, cache: Path | None = None) -> Path:
    """A local directory with the artifact's files: in place, or a download that is kept in the cache.

    A download is verified, file by file, before its directory appears; a directory already there is
    checked for missing files and wrong sizes only. Raises ConfigError as `locate` does, ArtifactError
    when the artifact is not whole.
    """
    return _cached(_located(locate(uri)), cache=Cache.open(cache), progress=None)


def download(location: Location, *, directory: Path, progress: Progress | None = None) -> Manifest:
    """Copy an artifact into a new directory, as `pull` does."""
    return _download(_located(location), directory=directory, progress=progress)


def _located(location: Location) -> _Origin:
    with ThreadPoolExecutor(1) as pool:
        signature = pool.submit(_signature, location.store, location.key(SIGNATURE_NAME))
        data = read_manifest_bytes(location)
    return _Origin(
        source=location.store,
        prefix=location.key(""),
        label=location.uri,
        data=data,
        manifest=parse_manifest(location, data),
        signature=signature.result(),
        directory=Path(location.uri) if isinstance(location.store, LocalStore) else None,
    )


def _linked(link: str) -> _Origin:
    files = LinkedFiles(link)
    data = read_at_most(files, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    manifest = Manifest.from_json(data)
    if (manifest.run_key, manifest.attempt) != (files.share.run_key, files.share.attempt):
        raise ArtifactError(f"{files.uri}: its {MANIFEST_NAME} is of another artifact")
    return _Origin(files, "", files.uri, data, manifest, _signature(files, SIGNATURE_NAME))


def _signature(source: Source, key: str) -> bytes | None:
    """The signature of a manifest, None where it is not signed."""
    with suppress(MissingKey):
        return read_at_most(source, key, MAX_SIGNATURE_BYTES)
    return None


def _cached(origin: _Origin, *, cache: Cache, progress: Progress | None) -> Path:
    if origin.directory is not None:
        if problem := first_problem(origin.directory, origin.manifest.files):
            raise ArtifactError(f"{origin.label}: {problem}: publish it again or take another copy")
        return origin.directory

    def bring(target: Path, staging: Path) -> None:
        _transfer(origin, target=target, staging=staging, progress=progress)

    return cache.get(origin.digest, is_whole=partial(_is_whole, manifest=origin.manifest), bring=bring)


def _download(origin: _Origin, *, directory: Path, progress: Progress | None) -> Manifest:
    directory = directory.absolute()
    staging = directory.with_name(f".{directory.name}.{origin.digest[:16]}.partial")
    try:
        with locked(staging.with_suffix(".lock")):
            if not _is_there(directory, origin.manifest, origin.data):
                _transfer(_from_cache(origin), target=directory, staging=staging, progress=progress)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}: choose another directory") from error
    return origin.manifest


def _is_there(directory: Path, manifest: Manifest, data: bytes) -> bool:
    """Whether this artifact is in the directory, whole. Raises ConfigError when something else is."""
    if not directory.is_dir() and not directory.is_file() and not directory.is_symlink():
        return False
    if directory.is_dir() and not any(directory.iterdir()):
        return False
    theirs = directory / MANIFEST_NAME
    if not directory.is_dir() or not theirs.is_file() or theirs.read_bytes() != data:
        raise ConfigError(f"{directory} exists and is not empty: choose another directory")
    problem = first_problem(directory, manifest.files)
    for entry in manifest.files:
        if not problem and sha256_file(directory / entry.path) != entry.sha256:
            problem = f"{entry.path} differs"
    if problem:
        raise ConfigError(f"{directory} holds this artifact damaged ({problem}): remove it and pull again")
    return True


def _from_cache(origin: _Origin) -> _Origin:
    """The same artifact in the cache, where it is there, else where it was found."""
    if origin.directory is None:
        with suppress(ConfigError):
            whole = partial(_is_whole, manifest=origin.manifest)
            if found := Cache.open().find(origin.digest, is_whole=whole):
                return replace(origin, source=LocalStore(found), prefix="", label=str(found))
    return origin


def _transfer(origin: _Origin, *, target: Path, staging: Path, progress: Progress | None) -> None:
    """Fetch every file and let the directory appear. Whatever is not as listed leaves nothing behind."""
    manifest = origin.manifest
    if path := colliding((*UNLISTED, *(entry.path for entry in manifest.files))):
        raise ArtifactError(f"{origin.label}: {path} is listed twice, or only case tells it from another")
    beside = {MANIFEST_NAME: origin.data}
    if origin.signature is not None:
        beside[SIGNATURE_NAME] = origin.signature
    Transfer(
        origin.source, prefix=origin.prefix, entries=manifest.files, staging=staging, label=origin.label
    ).into(target, beside=beside, progress=progress)


def _is_whole(directory: Path, *, manifest: Manifest) -> bool:
    return (directory / MANIFEST_NAME).is_file() and first_problem(directory, manifest.files) is None
