"""A store in a local (or shared, POSIX) directory."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from ffsplit.errors import ConfigError, StoreError
from ffsplit.store.entries import ATTEMPT_ID, MANIFEST_NAME, RUN_KEY, StoreGuarantees, read_chunks
from ffsplit.store.store import MissingKey, Names, Stored, check_key, check_prefix

_TEMPORARY = re.compile(r"\.ffsplit-[0-9a-f]{16}\.tmp")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_MKDIR_ATTEMPTS = _SWAP_ATTEMPTS = 20


class LocalStore:
    """Keys are files below a root directory, which is created by the first write.

    A write goes to a temporary file beside the target, which is synced and then renamed or hard-linked:
    a reader sees the old value or the new one. Symbolic links are listed but never read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @property
    def uri(self) -> str:
        return str(self._root)

    def put_bytes(self, key: str, data: bytes) -> None:
        self._replace(key, [data], size_bytes=len(data))

    def put_file(self, key: str, path: Path) -> None:
        with _os_errors(f"read {path}"):
            size_bytes = path.stat().st_size
        self._replace(key, read_chunks(path), size_bytes=size_bytes)

    def _replace(self, key: str, chunks: Iterable[bytes], *, size_bytes: int) -> None:
        target = self._path(key)
        with _os_errors(f"write {target}"):
            staged = _stage(target, chunks)
            try:
                if staged.stat().st_size != size_bytes:
                    raise StoreError(f"{target}: the source file changed while it was copied: try again")
                os.replace(staged, target)
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
            _sync_directory(target.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self._path(key)
        with _os_errors(f"write {target}"):
            staged = _stage(target, [data])
            try:
                os.link(staged, target)
            except FileExistsError:
                return staged.stat().st_nlink > 1  # a network file system may lose the reply to our own link
            finally:
                staged.unlink(missing_ok=True)
            _sync_directory(target.parent)
            return True

    def get_bytes(self, key: str) -> bytes:
        return b"".join(self.open_stream(key))

    def open_stream(self, key: str, *, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
        path = self._existing(key)
        with _os_errors(f"read {path}"):
            yield from read_chunks(path, start=start, size_bytes=size_bytes)

    def fetch(self, key: str, directory: Path) -> Path:
        return self._existing(key)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with _os_errors(f"read {path}"):
            try:
                return stat.S_ISREG(path.stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return False

    def list(self, prefix: str) -> Iterator[str]:
        yield from (entry.key for entry in self.list_details(prefix))

    def list_details(self, prefix: str) -> Iterator[Stored]:
        yield from sorted(self._walk(prefix, wanted=lambda name: not _TEMPORARY.fullmatch(name)))

    def presign(self, key: str, *, expires_s: int) -> str | None:
        return None

    def point(self, name: str, prefix: str) -> bool:
        link, target = self._path(name), self._directory(prefix)
        with _os_errors(f"link {link}"):
            if _is_pointed(link, target):
                return False
            if os.path.lexists(link) and not _was_pointed(link):
                raise StoreError(f"{link} was not made by FFSplit: rename it, so that it can name the newest")
            staged = _temporary_beside(link)
            try:
                _link_directory(staged, target)
                _swap(staged, link)
            finally:
                _remove(staged)
            _sync_directory(link.parent)
            return True

    def remove_leftovers(self, before: datetime, *, dry_run: bool) -> int:
        found = self._walk("", wanted=lambda name: bool(_TEMPORARY.fullmatch(name)))
        old = [self._root / entry.key for entry in found if entry.modified_at < before]
        for path in [] if dry_run else old:
            with _os_errors(f"delete {path}"):
                _remove(path)
        return len(old)

    def _walk(self, prefix: str, *, wanted: Callable[[str], bool]) -> Iterator[Stored]:
        """Every wanted file below a prefix, except those that vanish during the walk."""
        top = self._directory(prefix)
        with _os_errors(f"list {top}"):
            for directory, children, names in os.walk(top, onerror=_raise_unless_missing):
                links = [name for name in children if os.path.islink(os.path.join(directory, name))]
                staged = [name for name in children if _TEMPORARY.fullmatch(name) and name not in links]
                children[:] = [name for name in children if name not in staged]
                for name in filter(wanted, names + links + staged):
                    path = Path(directory) / name
                    with suppress(FileNotFoundError):
                        status = path.lstat()
                        modified = datetime.fromtimestamp(status.st_mtime, tz=timezone.utc)
                        yield Stored(path.relative_to(self._root).as_posix(), status.st_size, modified)

    def list_directories(self, prefix: str) -> Names:
        top = self._directory(prefix)
        with _os_errors(f"list {top}"), suppress(FileNotFoundError, NotADirectoryError):
            return sorted(child.name for child in top.iterdir() if child.is_dir())
        return []

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _os_errors(f"delete {path}"), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            self._prune(path.parent)

    def delete_prefix(self, prefix: str) -> None:
        path = self._path(check_prefix(prefix))
        with _os_errors(f"delete {path}"), suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(path)
            self._prune(path.parent)

    def check_writable(self) -> StoreGuarantees:
        probe = f"ffsplit-probe-{secrets.token_hex(8)}"
        missing = [path for path in (self._root, *self._root.parents) if not os.path.lexists(path)]
        try:
            self.put_if_absent(probe, b"")
            self.delete(probe)
            return StoreGuarantees(conditional_put="atomic", checksums=())
        except StoreError as error:
            cause = error.__cause__
            reason = _reason(cause) if isinstance(cause, OSError) else str(error)
            raise ConfigError(f"cannot write to {self.uri}: {reason}") from error
        finally:
            for directory in missing:
                with suppress(OSError):
                    directory.rmdir()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _directory(self, prefix: str) -> Path:
        return self._root / check_prefix(prefix)

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        with _os_errors(f"read {path}"):
            try:
                mode = path.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                raise MissingKey(f"{path} does not exist") from None
        if stat.S_ISLNK(mode):
            raise StoreError(f"{path} is a symbolic link, which a store must not contain: put the file there")
        if not stat.S_ISREG(mode):
            raise MissingKey(f"{path} does not exist")
        return path

    def _prune(self, directory: Path) -> None:
        """Remove empty directories upwards; the root stays."""
        with suppress(OSError):
            while directory != self._root:
                directory.rmdir()
                directory = directory.parent


def _stage(target: Path, chunks: Iterable[bytes]) -> Path:
    """Write chunks to a new, synced temporary file beside the target. Raises OSError."""
    staged = _temporary_beside(target)
    descriptor = _create(staged)
    try:
        with open(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return staged


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".ffsplit-{secrets.token_hex(8)}.tmp")


def _is_pointed(link: Path, target: Path) -> bool:
    """Whether a link leads to a directory, or a directory holds the same manifest as another."""
    if link.is_symlink():
        return link.parent / os.readlink(link) == target
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samefile(link / MANIFEST_NAME, target / MANIFEST_NAME)
    return False


def _was_pointed(link: Path) -> bool:
    """Whether something that exists was made by `point`: a link to an attempt, or hard links to its files."""
    if link.is_symlink():
        ends = Path(os.readlink(link)).parts[-2:]
        return len(ends) == 2 and bool(RUN_KEY.fullmatch(ends[0]) and ATTEMPT_ID.fullmatch(ends[1]))
    return (link / MANIFEST_NAME).is_file() and (link / MANIFEST_NAME).stat().st_nlink > 1


def _link_directory(staged: Path, target: Path) -> None:
    """A relative link to a directory beside or below it; a directory of hard links if there are no links."""
    try:
        os.symlink(os.path.relpath(target, staged.parent), staged)
    except OSError as error:
        if error.errno not in _NO_LINKS or not (target / MANIFEST_NAME).is_file():
            raise
        shutil.copytree(target, staged, copy_function=os.link)


def _swap(staged: Path, link: Path) -> None:
    """Rename over the old link. A directory cannot be renamed over, so an old one is moved away first."""
    for _ in range(_SWAP_ATTEMPTS):
        try:
            return os.replace(staged, link)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = _temporary_beside(link)
        with suppress(FileNotFoundError):  # another process has just moved it
            os.rename(link, aside)
        _remove(aside)
    raise StoreError(f"{link} is changed by other processes all the time: read it again")


def _remove(path: Path) -> None:
    """Delete a file, a link or a directory, if it exists."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _create(path: Path) -> int:
    """Open a new file. Creates its directory again if another process has just removed it as empty."""
    for attempt in range(_MKDIR_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):  # mkdir may report a directory that is then removed
            if attempt + 1 == _MKDIR_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _sync_directory(directory: Path) -> None:
    """Make a rename durable, if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _os_errors(action: str) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the failed action."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {action}: {_reason(error)}") from error


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _reason(error: OSError) -> str:
    """The problem and how to fix it, in one line."""
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "a part of the path is a file, not a directory: choose another"
    if isinstance(error, PermissionError) and error.errno == errno.EACCES:
        return "permission denied: fix the directory's permissions or choose another"
    if error.errno == errno.EROFS:
        return "the file system is read-only: choose another directory"
    if error.errno == errno.ENOSPC:
        return "no space left on the device: free some or choose another directory"
    if error.filename2 and error.errno in _NO_LINKS:
        return "the file system has no hard links, which a commit needs: choose another directory"
    return f"{error.strerror or error}: choose another directory"
