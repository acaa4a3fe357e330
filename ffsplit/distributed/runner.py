"""How stages are run: one small protocol, and a serial runner that gives the same bytes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from itertools import islice
from types import TracebackType
from typing import Protocol, TypeVar

from ffsplit.directories import full_disk_explained
from ffsplit.errors import FFSplitError, explained
from ffsplit.machine import return_freed_memory

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Worker = Callable[[Item], Answer]

ANSWER_WITHIN_S = 600.0
"""How long a host may take to answer a request that needs no transfer."""


@contextmanager
def working_on(stage: str, item: object) -> Iterator[None]:
    """Around a stage's work on one item, in the process that does it.

    Turns any error into one line. Afterwards freed memory goes back to the system.
    """
    name = getattr(item, "name", None)
    what = f"{stage} of {name} failed" if isinstance(name, str) else f"{stage} failed"
    try:
        with explained(what, kind=FFSplitError), full_disk_explained():
            yield
    finally:
        return_freed_memory()


class Runner(Protocol):
    """Runs a stage's items somewhere. Answers come as they are ready, each with its item's index.

    Items must be safe to run twice: the item of a lost worker is given to another.
    """

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def num_workers(self) -> int:
        """How many items can run at once at the moment."""
        ...

    @property
    def is_spread(self) -> bool:
        """Whether items may run on other hosts than this one."""
        ...

    def map_tasks(
        self, stage: str, function: Worker[Item, Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        """Call a function on every item, each as a separate task."""
        ...

    def map_workers(
        self,
        stage: str,
        factory: Callable[[], Worker[Item, Answer]],
        items: Sequence[Item],
        *,
        lanes: int = 1,
    ) -> Iterator[tuple[int, Answer]]:
        """Distribute the items over workers that keep their state. The factory makes each worker once.

        A worker is given up to `lanes` items at once, each in a thread of its own.
        """
        ...

    def run_alone(
        self,
        stage: str,
        function: Worker[Item, Answer],
        item: Item,
        *,
        threads: int = 1,
        reserved: bool = False,
    ) -> Answer:
        """Call a function on one item while this runner runs nothing else.

        `reserved`: on a host where no other work is running either.
        """
        ...

    def on_every_host(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, within_s: float = ANSWER_WITHIN_S
    ) -> dict[str, Answer]:
        """Call a function once on each host that items may run on. Returns answers by host name.

        A host that leaves meanwhile has no answer. Raises FFSplitError if a host does not answer in time, or
        its process was killed.
        """
        ...

    def run_together(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, size: int, threads: int = 1
    ) -> Answer:
        """Call a function on one item in `size` processes at once, connected by torch.distributed.

        The answer is the first process's. A runner limited to one process runs the function there alone,
        unconnected, and it must do the work of all.
        """
        ...


class SerialRunner:
    """Runs everything in this process, one item after the other."""

    num_workers = 1
    is_spread = False

    def __enter__(self) -> SerialRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def map_tasks(
        self, stage: str, function: Worker[Item, Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        for index, item in enumerate(items):
            with working_on(stage, item):
                answer = function(item)
            yield index, answer

    def map_workers(
        self,
        stage: str,
        factory: Callable[[], Worker[Item, Answer]],
        items: Sequence[Item],
        *,
        lanes: int = 1,
    ) -> Iterator[tuple[int, Answer]]:
        with working_on(stage, None):
            worker = factory()
        if lanes == 1:
            yield from self.map_tasks(stage, worker, items)
            return

        def answer(item: Item) -> Answer:
            with working_on(stage, item):
                return worker(item)

        threads = ThreadPoolExecutor(lanes)
        try:
            waiting = iter(enumerate(items))
            calls: dict[Future[Answer], int] = {}
            while True:
                for index, item in islice(waiting, lanes - len(calls)):
                    calls[threads.submit(copy_context().run, answer, item)] = index
                if not calls:
                    return
                for call in wait(calls, return_when=FIRST_COMPLETED).done:
                    yield calls.pop(call), call.result()
        finally:
            threads.shutdown(cancel_futures=True)

    def run_alone(
        self,
        stage: str,
        function: Worker[Item, Answer],
        item: Item,
        *,
        threads: int = 1,
        reserved: bool = False,
    ) -> Answer:
        with working_on(stage, item):
            return function(item)

    def on_every_host(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, within_s: float = ANSWER_WITHIN_S
    ) -> dict[str, Answer]:
        with working_on(stage, item):
            return {socket.gethostname(): function(item)}

    def run_together(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, size: int, threads: int = 1
    ) -> Answer:
        with working_on(stage, item):
            return function(item)
