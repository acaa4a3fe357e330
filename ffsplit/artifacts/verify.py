"""Check an artifact against its manifest, byte by byte, and the manifest against its commit."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

from ffsplit.artifacts.entries import FileEntry
from ffsplit.artifacts.locate import Location, locate, parse_manifest
from ffsplit.artifacts.manifest import MANIFEST_NAME, UNLISTED, Manifest
from ffsplit.artifacts.stores import MissingKey
from ffsplit.config import Record
from ffsplit.errors import ArtifactError, StoreError

FROM_THE_HUB = re.compile(r"\.gitattributes$|\.cache/huggingface/")
"""What the hub, and a download from it, put beside an artifact's files."""


class VerifyReport(Record):
    """What was checked, and everything that is wrong with it, one line each."""

    location: str
    num_files: int
    """Files that the manifest lists."""
    total_bytes: int
    """Bytes that were read to check them."""
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(uri: str) -> VerifyReport:
    """Read every file of an artifact and compare size and sha256 with its manifest.

    Reported as problems, with the file's name: one that differs, is missing, is not listed, is listed
    twice or is a symbolic link; a manifest that lists an unsafe path, cannot be read, or is not the
    one committed. Raises ConfigError when the URI names no artifact, StoreError when the store
    cannot be listed.
    """
    location = locate(uri)
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
    """The manifest, None when it cannot be used, and what is wrong with it."""
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
    """The bytes read of a file, and what is wrong with it."""
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
    """Files that are not listed, and files listed more than once or that never can be."""
    times = Counter(entry.path for entry in manifest.files)
    present = {key.removeprefix(location.key("")) for key in location.store.list(location.prefix)}
    problems = [f"{path}: is listed {count} times" for path, count in sorted(times.items()) if count > 1]
    if MANIFEST_NAME in times:
        problems.append(f"{MANIFEST_NAME}: lists itself")
    extra = sorted(path for path in present - set(times) - UNLISTED if not FROM_THE_HUB.match(path))
    return problems + [f"{_printable(path)}: is not listed in {MANIFEST_NAME}" for path in extra]


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)
