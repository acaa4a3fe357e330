"""The local cache of artifacts, shared by the processes of a machine and limited in size.

<root>/artifacts/<digest>/      a complete artifact, verified before its directory appeared
<root>/artifacts/.<digest>/     a download in progress, or an interrupted one, which the next download resumes
<root>/locks/<digest>           exists while a process downloads or removes that artifact
<root>/readers/<digest>         locked by every process that uses that artifact, until the process ends

The root is $FFSPLIT_CACHE, else ~/.cache/ffsplit; the size limit is $FFSPLIT_CACHE_LIMIT, 50GB by default.
The least recently used artifacts are removed first. An artifact that a process reads, or that was used in
the last ten minutes, is never removed, whatever the limit. An artifact larger than the limit is downloaded
and read like any other, and removed once nobody reads it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ffsplit.config import parse_size
from ffsplit.directories import home_directory, user_path
from ffsplit.errors import ConfigError
from ffsplit.store.locks import locked, share, try_locked

DEFAULT_LIMIT = "50GB"
GRACE_S = 600.0


@dataclass(frozen=True)
class Cache:
    """Directories, named by the digest of their contents."""

    root: Path
    limit_bytes: int

    @classmethod
    def open(cls, root: Path | None = None) -> Cache:
        """The cache of this user, or the one in `root`. Raises ConfigError if the limit is not a size."""
        given, home = os.environ.get("FFSPLIT_CACHE"), home_directory()
        if root is None and not given and home is None:
            chosen = Path("no-home")  # empty, and never created: most commands need no cache
        else:
            chosen = (root or user_path(given or "~/.cache/ffsplit")).absolute()
        limit = os.environ.get("FFSPLIT_CACHE_LIMIT") or DEFAULT_LIMIT
        return cls(chosen, parse_size(limit, name="FFSPLIT_CACHE_LIMIT"))

    def find(self, digest: str, *, is_whole: Callable[[Path], bool]) -> Path | None:
        """The directory of a digest, None when it is missing or incomplete. Counts as a use of it.

        The directory is kept until this process ends.
        """
        directory = self.root / "artifacts" / digest
        if not is_whole(directory):
            return None
        try:
            _read(self._readers(digest))
        except OSError:  # a user who cannot write to the cache cannot shrink it either
            return directory
        if not is_whole(directory):  # it was removed just before
            return None
        with suppress(OSError):
            os.utime(directory)
        return directory

    def get(
        self, digest: str, *, is_whole: Callable[[Path], bool], bring: Callable[[Path, Path], None]
    ) -> Path:
        """The directory of a digest, downloaded by `bring(target, staging)` if it is missing.

        If several processes want the same one, one downloads it and the others wait.
        """
        if found := self.find(digest, is_whole=is_whole):
            return found
        if not self.root.is_absolute():
            raise ConfigError("this user has no home directory for the cache: set FFSPLIT_CACHE, or HOME")
        target = self.root / "artifacts" / digest
        try:
            _read(self._readers(digest))
            with locked(self._lock(digest)):
                if found := self.find(digest, is_whole=is_whole):
                    return found
                shutil.rmtree(target, ignore_errors=True)
                bring(target, target.with_name(f".{digest}"))
        except OSError as error:
            why = f"cannot write the cache in {self.root}: {error.strerror or error}"
            raise ConfigError(f"{why}: set FFSPLIT_CACHE to another directory") from error
        self.shrink()
        return target

    def shrink(self) -> None:
        """Remove the least recently used artifacts that nobody reads until the rest is within the limit."""
        entries = []
        with suppress(OSError):
            for path in (self.root / "artifacts").iterdir():
                with suppress(OSError):
                    entries.append((path.stat().st_mtime, _size_bytes(path), path))
        total = sum(size_bytes for _, size_bytes, _ in entries)
        for used_at, size_bytes, path in sorted(entries):
            if total <= self.limit_bytes or time.time() - used_at < GRACE_S:
                return
            digest = path.name.removeprefix(".")
            with try_locked(self._lock(digest)) as held, try_locked(self._readers(digest)) as unread:
                if held and unread:
                    shutil.rmtree(path, ignore_errors=True)
                    total -= size_bytes

    def _lock(self, digest: str) -> Path:
        return self.root / "locks" / digest

    def _readers(self, digest: str) -> Path:
        return self.root / "readers" / digest


_reading: dict[tuple[int, Path], int] = {}
"""The descriptors that hold this process's reader locks; a forked child takes its own."""
_guard = threading.Lock()


def _read(path: Path) -> None:
    """Lock an artifact as a reader, once per process, until the process ends. Raises OSError."""
    with _guard:
        held = _reading.get((os.getpid(), path))
        if held is not None and _is_at(held, path):
            return
        _reading[os.getpid(), path] = share(path)
        if held is not None:
            os.close(held)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still is the descriptor's file: somebody may have cleared the cache."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _size_bytes(directory: Path) -> int:
    """Bytes used on disk: a file that is still being downloaded is sparse."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
