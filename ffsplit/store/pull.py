"""Download an artifact to this machine, and verify every byte against its manifest."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ffsplit.config import Record
from ffsplit.errors import ArtifactError, ConfigError, StoreError
from ffsplit.store.artifact import Location, locate, parse_manifest, read_manifest_bytes
from ffsplit.store.cache import Cache
from ffsplit.store.entries import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    UNLISTED,
    FileEntry,
    colliding,
    is_link,
    sha256_file,
)
from ffsplit.store.local import LocalStore
from ffsplit.store.locks import locked
from ffsplit.store.manifest import MAX_MANIFEST_BYTES, Manifest
from ffsplit.store.signing import MAX_SIGNATURE_BYTES, check_key_kind, verify_manifest
from ffsplit.store.store import MissingKey, Source, read_at_most
from ffsplit.store.transfer import Progress, Transfer, first_problem


@dataclass(frozen=True)
class _Origin:
    """An artifact to download, and its source. `data` holds the committed bytes of its manifest."""

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
    uri: str | os.PathLike[str],
    directory: str | os.PathLike[str] | None = None,
    *,
    verify_key: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download an artifact into a directory, or into the cache, and return its path.

    `uri` is what `locate` takes, or a link from `ffsplit share`. Every sha256 is checked before the
    directory appears. A directory that already holds this artifact is verified in full and kept. With
    `verify_key`, a public key, an artifact without a valid signature is refused. Raises ConfigError as
    `locate` does, and if the directory cannot be created or has other content; ArtifactError if the
    artifact is incomplete or not signed; StoreError if the store fails: the next pull then resumes.
    """
    uri, directory = os.fspath(uri), None if directory is None else Path(directory)
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
    """A local directory with the artifact's files: in place, or downloaded into the cache.

    A download is verified, file by file, before its directory appears; an existing directory is checked
    only for missing files and wrong sizes. Raises ConfigError as `locate` does, ArtifactError if the
    artifact is incomplete.
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
    from ffsplit.store.links import LinkedFiles  # needs urllib3, which serving an artifact does not

    files = LinkedFiles(link)
    data = read_at_most(files, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    manifest = Manifest.from_json(data)
    if (manifest.run_key, manifest.attempt) != (files.share.run_key, files.share.attempt):
        raise ArtifactError(f"{files.uri}: its {MANIFEST_NAME} belongs to another artifact")
    return _Origin(files, "", files.uri, data, manifest, _signature(files, SIGNATURE_NAME))


def _signature(source: Source, key: str) -> bytes | None:
    """The signature of a manifest, None if it is not signed."""
    with suppress(MissingKey):
        return read_at_most(source, key, MAX_SIGNATURE_BYTES)
    return None


def _cached(origin: _Origin, *, cache: Cache, progress: Progress | None) -> Path:
    if origin.directory is not None:
        if problem := first_problem(origin.directory, origin.manifest.files):
            raise ArtifactError(f"{origin.label}: {problem}: publish it again or use another copy")
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
    """Whether the directory holds this complete artifact. Raises ConfigError if it holds anything else."""
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
        raise ConfigError(f"{directory} holds a damaged copy ({problem}): remove it and pull again")
    return True


def _from_cache(origin: _Origin) -> _Origin:
    """The same artifact, read from the cache if it is there."""
    if origin.directory is None:
        with suppress(ConfigError):
            whole = partial(_is_whole, manifest=origin.manifest)
            if found := Cache.open().find(origin.digest, is_whole=whole):
                return replace(origin, source=LocalStore(found), prefix="", label=str(found))
    return origin


def _transfer(origin: _Origin, *, target: Path, staging: Path, progress: Progress | None) -> None:
    """Fetch and verify every file, then make the directory appear. A mismatch leaves nothing behind."""
    manifest = origin.manifest
    if path := colliding((*UNLISTED, *(entry.path for entry in manifest.files))):
        raise ArtifactError(f"{origin.label}: {path} is listed twice, or differs from another only in case")
    beside = {MANIFEST_NAME: origin.data}
    if origin.signature is not None:
        beside[SIGNATURE_NAME] = origin.signature
    Transfer(
        origin.source, prefix=origin.prefix, entries=manifest.files, staging=staging, label=origin.label
    ).into(target, beside=beside, progress=progress)


def _is_whole(directory: Path, *, manifest: Manifest) -> bool:
    return (directory / MANIFEST_NAME).is_file() and first_problem(directory, manifest.files) is None


# Check an artifact against its manifest, byte by byte, and the manifest against its commit.

FROM_THE_HUB = re.compile(r"\.gitattributes$|\.cache/huggingface/")
"""Files that the Hugging Face Hub, or a download from it, adds beside an artifact's files."""


class VerifyReport(Record):
    """What was checked, and every problem, one line each."""

    location: str
    num_files: int
    """Files that the manifest lists."""
    total_bytes: int
    """Bytes that were read to check them."""
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(uri: str | os.PathLike[str]) -> VerifyReport:
    """Read every file of an artifact and compare size and sha256 with its manifest.

    Reported as problems, by name: a file that differs, is missing, is not listed, is listed twice or is
    a symbolic link; a manifest that lists an unsafe path, cannot be read, or is not the committed one.
    Raises ConfigError if the URI names no artifact, StoreError if the store cannot be listed.
    """
    location = locate(os.fspath(uri))
    manifest, problems = _check_manifest(location)
    if manifest is None:
        return VerifyReport(location=location.uri, num_files=0, total_bytes=0, problems=tuple(problems))
    total_bytes = 0
    for entry in manifest.files:
        num_bytes, problem = _check_file(location, entry)
        total_bytes += num_bytes
        problems += [problem] if problem else []
    problems += _check_names(location, manifest)
    return VerifyReport(
        location=location.uri,
        num_files=len(manifest.files),
        total_bytes=total_bytes,
        problems=tuple(problems),
    )


def _check_manifest(location: Location) -> tuple[Manifest | None, list[str]]:
    """The manifest, None if it cannot be used, and its problems."""
    try:
        data = location.store.get_bytes(location.key(MANIFEST_NAME))
    except MissingKey:
        return None, [f"{MANIFEST_NAME}: is missing"]
    except StoreError as error:
        return None, [f"{MANIFEST_NAME}: {error}"]
    problems = []
    if location.commit and hashlib.sha256(data).hexdigest() != location.commit.manifest_sha256:
        problems.append(f"{MANIFEST_NAME}: is not the one that was committed")
    try:
        return parse_manifest(location, data), problems
    except ArtifactError as error:
        return None, [*problems, str(error).removeprefix(f"{location.uri}: ")]


def _check_file(location: Location, entry: FileEntry) -> tuple[int, str | None]:
    """The number of bytes read of a file, and its problem if there is one."""
    digest, num_bytes = hashlib.sha256(), 0
    try:
        for chunk in location.store.open_stream(location.key(entry.path)):
            digest.update(chunk)
            num_bytes += len(chunk)
    except MissingKey:
        return 0, f"{entry.path}: is missing"
    except StoreError as error:
        return num_bytes, f"{entry.path}: {error}"
    if num_bytes != entry.size_bytes:
        return num_bytes, f"{entry.path}: has {num_bytes} bytes instead of {entry.size_bytes}"
    if digest.hexdigest() != entry.sha256:
        return num_bytes, f"{entry.path}: differs (sha256 {digest.hexdigest()}, listed {entry.sha256})"
    return num_bytes, None


def _check_names(location: Location, manifest: Manifest) -> list[str]:
    """Problems of names: files that are not listed, are listed twice, or must not be listed."""
    times = Counter(entry.path for entry in manifest.files)
    present = {key.removeprefix(location.key("")) for key in location.store.list(location.prefix)}
    problems = [f"{path}: is listed {count} times" for path, count in sorted(times.items()) if count > 1]
    if MANIFEST_NAME in times:
        problems.append(f"{MANIFEST_NAME}: lists itself")
    extra = sorted(path for path in present - set(times) - UNLISTED if not FROM_THE_HUB.match(path))
    return problems + [f"{_printable(path)}: is not listed in {MANIFEST_NAME}" for path in extra]


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)
