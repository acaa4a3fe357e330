"""Files of a moment: what is said when the disk that they are on is full."""

from __future__ import annotations

import errno
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ffsplit.errors import FFSplitError


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """Turn the errors of whichever library met a full disk into one FFSplitError."""
    try:
        yield
    except FFSplitError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
            raise
        raise FFSplitError(
            f"no space left for temporary files in {tempfile.gettempdir()} on host {socket.gethostname()}: "
            "free some or set TMPDIR; what is finished stays, and the same command goes on from there"
        ) from error
