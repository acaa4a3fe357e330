"""Slots on Ray: actors that keep a worker, and calls that are tasks of their own."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from ffsplit.distributed.dispatch import Done, Event, Failed, Lost, Ready
from ffsplit.distributed.observing import Observed
from ffsplit.distributed.runner import Worker
from ffsplit.errors import FFSplitError
from ffsplit.redaction import guarded

LOSSES: dict[type[Exception], str] = {
    OutOfMemoryError: "its host was out of memory: give fewer --workers or a larger host",
    NodeDiedError: "its host left",
    WorkerCrashedError: "its process died",
    ActorDiedError: "its process died",
    ActorUnavailableError: "its host could not be reached",
    ActorUnschedulableError: "its host left",
    TaskUnschedulableError: "its host left",
    ObjectLostError: "its answer was lost with its host",
}
Options = dict[str, Any]


class _Host:
    """An actor that holds one worker."""

    def __init__(self, factory: Callable[[], Worker[Any, Any]], observed: Observed) -> None:
        self._factory, self._observed = factory, observed

    def ready(self) -> None:
        self._worker = guarded(lambda _: self._factory(), None)

    def run(self, item: Any) -> Any:
        return self._observed(self._worker, item)


class _Pool:
    """What both kinds of slots share: events that Ray's own thread puts into a queue."""

    def __init__(self, *, stage: str, room: Callable[[], int], options: Callable[[], Options]) -> None:
        self._stage, self._room, self._options = stage, room, options
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._running: dict[int, Any] = {}
        self._names = count()
        self._observed = Observed.here(stage)

    def room(self) -> int:
        return self._room()

    def next_event(self, timeout_s: float) -> Event | None:
        try:
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None

    def _watch(self, slot: int, reference: Any, *, ready: bool = False) -> None:
        """Turn the end of a call into an event."""

        def ended(future: Any) -> None:
            if self._running.get(slot) is not reference:
                return  # the slot was closed meanwhile
            error = future.exception()
            if error is None:
                self._events.put(Ready(slot) if ready else Done(slot, future.result()))
            else:
                event = _event_of(slot, error)
                if isinstance(event, Lost):
                    self._observed.lost(event.reason)
                self._events.put(event)

        self._running[slot] = reference
        reference.future().add_done_callback(ended)


class TaskPool(_Pool):
    """Each item a task of its own; a slot is no more than the right to have one in flight."""

    def __init__(
        self,
        function: Worker[Any, Any],
        *,
        stage: str,
        room: Callable[[], int],
        options: Callable[[], Options],
    ) -> None:
        super().__init__(stage=stage, room=room, options=options)
        self._task, self._function = ray.remote(run_task), function

    def open(self) -> int:
        slot = next(self._names)
        self._events.put(Ready(slot))
        return slot

    def start(self, slot: int, item: Any) -> None:
        options = {"name": self._stage, "max_retries": 0} | self._options()
        self._watch(slot, self._task.options(**options).remote(self._observed, self._function, item))

    def close(self, slot: int) -> None:
        reference = self._running.pop(slot, None)
        if reference is not None:
            ray.cancel(reference, force=True)  # a no-op for one that has ended


class ActorPool(_Pool):
    """Each slot an actor that holds one worker, under the stage's name."""

    def __init__(
        self,
        factory: Callable[[], Worker[Any, Any]],
        *,
        stage: str,
        room: Callable[[], int],
        options: Callable[[], Options],
    ) -> None:
        super().__init__(stage=stage, room=room, options=options)
        self._host, self._factory = ray.remote(_Host), factory
        self._actors: dict[int, Any] = {}
        self._nonce = secrets.token_hex(3)  # several runs of one process must not share a name

    def open(self) -> int:
        slot = next(self._names)
        name = f"{self._stage} {self._nonce}-{slot}"
        options = {"max_restarts": 0, "max_task_retries": 0, "name": name} | self._options()
        actor = self._actors[slot] = self._host.options(**options).remote(self._factory, self._observed)
        self._watch(slot, actor.ready.options(name=f"{self._stage} (start)").remote(), ready=True)
        return slot

    def start(self, slot: int, item: Any) -> None:
        self._watch(slot, self._actors[slot].run.options(name=self._stage).remote(item))

    def close(self, slot: int) -> None:
        self._running.pop(slot, None)
        ray.kill(self._actors.pop(slot))


def run_task(observed: Observed, function: Worker[Any, Any], item: Any) -> Any:
    return observed(function, item)


def _event_of(slot: int, error: BaseException) -> Event:
    if isinstance(error, RayTaskError):
        return Failed(slot, error_of(error))
    for kind, reason in LOSSES.items():
        if isinstance(error, kind):
            return Lost(slot, "its host was out of memory" if "memory" in str(error).lower() else reason)
    return Failed(slot, error)


def error_of(error: RayTaskError) -> Exception:
    """An error that FFSplit raised in a task, as itself; any other with the traceback from there."""
    return error.cause if isinstance(error.cause, FFSplitError) else error
