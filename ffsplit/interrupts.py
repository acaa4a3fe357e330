"""Interrupts that leave a session usable: they wait for the end of what cannot be left half done.

torch and transformers cannot be imported again after an interrupted import, so a notebook would have to
restart its kernel. A local Ray that is interrupted while it ends leaves processes behind.
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"
LOOK_AGAIN_S = 0.1


@contextmanager
def whole_imports() -> Iterator[None]:
    """Delay SIGINT while a module is being imported in this context."""
    outside = _num_imports(inspect.currentframe())  # this code may itself run in an import
    with _delayed_while(lambda frame: _num_imports(frame) > outside):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay SIGINT until the end of this context, which must be a matter of seconds."""
    with _delayed_while(lambda _: True):
        yield


@contextmanager
def _delayed_while(is_busy: Callable[[FrameType | None], bool]) -> Iterator[None]:
    """Delay SIGINT while the code that it would interrupt is busy. Only the main thread gets signals."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    again: threading.Timer | None = None

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal again
        again = None
        if is_busy(frame):
            again = threading.Timer(LOOK_AGAIN_S, os.kill, (os.getpid(), signum))
            again.daemon = True
            again.start()
        else:
            before(signum, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if again is not None:
            again.cancel()
            before(signal.SIGINT, inspect.currentframe())


def _num_imports(frame: FrameType | None) -> int:
    number = 0
    while frame is not None:
        number += frame.f_code.co_filename == IMPORTING
        frame = frame.f_back
    return number
