"""Standard streams that may be closed, full or unread. A failed write to them never ends a run.

Notes (progress, logs and errors) go to stderr, and a command's output goes to stdout. At the end,
`lost_output` reports whether all of the output arrived.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

STANDARD = (0, 1, 2)


class Stream:
    """A text stream that never raises. It drops what it cannot write, and `lost` keeps the first error."""

    def __init__(self, stream: TextIO | Stream | None) -> None:
        self.lost: Exception | None = None
        self._is_missing = stream is None
        self._stream: Any = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115

    def write(self, text: str) -> int:
        if self._is_missing and text:
            self._lose(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (OSError, ValueError):
            return False

    def end(self) -> None:
        """Flush, and drop what cannot be flushed: otherwise the interpreter would fail at exit."""
        self.flush()
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: Exception) -> None:
        self.lost = self.lost or error
        # Nobody will read the pipe again. Child processes write to the same descriptor.
        if getattr(error, "errno", None) == errno.EPIPE:
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            if (descriptor := self._stream.fileno()) in STANDARD:
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@contextmanager
def guarded() -> Iterator[None]:
    """Make stdout and stderr streams that never raise, in this context."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    out, notes = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, notes)
    try:
        yield
    finally:
        out.end()
        notes.end()
        sys.stdout, sys.stderr = before


def stderr() -> Stream:
    """The stream for notes, from the current sys.stderr."""
    stream: Any = sys.stderr
    return stream if isinstance(stream, Stream) else Stream(stream)


def note(line: str) -> None:
    """Write one line on stderr, if it can be written."""
    stream = stderr()
    stream.write(f"{line}\n")
    stream.flush()


def lost_output() -> str | None:
    """Why some output on stdout was lost; None if all of it arrived."""
    stream: Any = sys.stdout
    if not isinstance(stream, Stream):
        return None
    stream.flush()
    return None if stream.lost is None else getattr(stream.lost, "strerror", None) or str(stream.lost)


def _open_closed_descriptors() -> None:
    """Open closed standard descriptors on /dev/null: children would write into a file that got one."""
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this descriptor
            os.set_inheritable(opened, True)
