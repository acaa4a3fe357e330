"""Slots on Ray: actors that hold a worker, or single tasks."""

from __future__ import annotations

import secrets
import threading
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
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.exceptions import OutOfMemoryError as HostOutOfMemoryError

from ffsplit.distributed.alike import check_alike, install, missing_package
from ffsplit.distributed.dispatch import Done, Event, Failed, Lost, Ready
from ffsplit.distributed.observing import Observed
from ffsplit.distributed.runner import Worker, working_on
from ffsplit.errors import FFSplitError, OutOfMemoryError, reason_of
from ffsplit.machine import where_it_runs
from ffsplit.redaction import guarded

OUT_OF_MEMORY = "its host was out of memory: give fewer --workers or a larger host"
LOSSES: dict[type[Exception], str] = {
    HostOutOfMemoryError: OUT_OF_MEMORY,
    NodeDiedError: "its host left",
    WorkerCrashedError: "its process died",
    ActorDiedError: "its process died",
    ActorUnavailableError: "its host could not be reached",
    ActorUnschedulableError: "its host left",
    TaskUnschedulableError: "its host left",
    ObjectLostError: "its answer was lost with its host",
}
_KILLED_FOR_MEMORY = ("due to the node running low on memory", "NODE_OUT_OF_MEMORY")
Options = dict[str, Any]


class _Host:
    """An actor that holds one worker, which several threads may call."""

    def __init__(self, factory: Callable[[], Worker[Any, Any]], observed: Observed) -> None:
        self._factory, self._observed = factory, observed
        self._lock = threading.Lock()
        self._worker: Worker[Any, Any] | None = None

    def ready(self) -> str | None:
        """Make the worker. Says once where it is, if it has a GPU."""
        with self._lock:
            if self._worker is not None:
                return None
            check_alike(self._observed.versions)
            with working_on(self._observed.stage, None):
                self._worker = guarded(lambda _: self._factory(), None)
            return where_it_runs() if ray.get_gpu_ids() else None

    def run(self, item: Any) -> Any:
        assert self._worker is not None, "`ready` has been called"
        return self._observed(self._worker, item)


class _Pool:
    """The common part of both pools: a queue of events, filled by Ray's own thread."""

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
            try:
                event = _event_of(slot, future, ready=ready)
                if isinstance(event, Lost):
                    self._observed.lost(event.reason)
                elif ready and isinstance(event, Ready) and future.result() is not None:
                    self._observed.placed(future.result())
            except BaseException as error:  # Ray's own thread would swallow it
                event = Failed(slot, error)
            self._events.put(event)

        self._running[slot] = reference
        reference.future().add_done_callback(ended)


class TaskPool(_Pool):
    """Runs each item as a task. A slot permits one task in flight."""

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
            ray.cancel(reference, force=True)  # does nothing if it has ended


class ActorPool(_Pool):
    """Each slot is a lane of an actor that holds one worker, named after the stage."""

    def __init__(
        self,
        factory: Callable[[], Worker[Any, Any]],
        *,
        stage: str,
        room: Callable[[], int],
        options: Callable[[], Options],
        lanes: int = 1,
    ) -> None:
        super().__init__(stage=stage, room=room, options=options)
        self._host, self._factory, self._lanes = ray.remote(_Host), factory, lanes
        self._num_workers = 1
        self._actors: dict[int, Any] = {}
        self._nonce = secrets.token_hex(3)  # several runs in one process must not share names

    def room(self) -> int:
        self._num_workers = self._room()
        return self._num_workers * self._lanes

    def open(self) -> int:
        slot = next(self._names)
        actor = self._actors[slot] = self._with_fewest_lanes() or self._made(slot)
        self._watch(slot, actor.ready.options(name=f"{self._stage} (start)").remote(), ready=True)
        return slot

    def _with_fewest_lanes(self) -> Any:
        """An actor with a free lane, once there are as many actors as there may be; else None."""
        slots: dict[int, list[int]] = {}
        for slot, actor in self._actors.items():
            slots.setdefault(id(actor), []).append(slot)
        fewest = min(slots.values(), key=len, default=[])
        is_full = len(slots) < self._num_workers or len(fewest) >= self._lanes
        return None if is_full else self._actors[fewest[0]]

    def _made(self, slot: int) -> Any:
        name = f"{self._stage} {self._nonce}-{slot}"
        options = {"max_restarts": 0, "max_task_retries": 0, "name": name} | self._options()
        options |= {"max_concurrency": self._lanes} if self._lanes > 1 else {}
        return self._host.options(**options).remote(self._factory, self._observed)

    def start(self, slot: int, item: Any) -> None:
        self._watch(slot, self._actors[slot].run.options(name=self._stage).remote(item))

    def close(self, slot: int) -> None:
        self._running.pop(slot, None)
        actor = self._actors.pop(slot, None)
        if actor is not None and all(each is not actor for each in self._actors.values()):
            ray.kill(actor)  # an actor on an unreachable host may still run; does nothing to a dead one


def run_task(observed: Observed, function: Worker[Any, Any], item: Any) -> Any:
    return observed(function, item)


def _event_of(slot: int, future: Any, *, ready: bool) -> Event:
    error = future.exception()
    if error is None:
        return Ready(slot) if ready else Done(slot, future.result())
    reason = reason_of_loss(error)
    if reason is None and isinstance(error, RayTaskError):
        return Failed(slot, error_of(error))
    return Failed(slot, _unforeseen(error)) if reason is None else Lost(slot, reason, kind_of_loss(reason))


def reason_of_loss(error: BaseException) -> str | None:
    """Why a worker was lost; None for an error that is not the loss of a worker.

    A host without this package counts as lost: others may have it. Only the message shows that, and that
    Ray's memory monitor killed an actor. Ray also lists memory among the possible causes of any death; that
    does not count.
    """
    if (package := missing_package(error)) is not None:
        return f"its host {install(package)}"
    if isinstance(error, RayTaskError):
        return None
    if any(text in str(error) for text in _KILLED_FOR_MEMORY):
        return OUT_OF_MEMORY
    return next((reason for loss, reason in LOSSES.items() if isinstance(error, loss)), None)


def kind_of_loss(reason: str) -> type[FFSplitError]:
    """The error to raise for a worker that was lost for a reason too often."""
    return OutOfMemoryError if reason == OUT_OF_MEMORY else FFSplitError


def error_of(error: RayTaskError) -> FFSplitError:
    """The error that FFSplit raised in a task. Its cause has the traceback from there."""
    known = error.cause if isinstance(error.cause, FFSplitError) else _unforeseen(error.cause)
    known.__cause__ = error
    return known


def _unforeseen(error: BaseException) -> FFSplitError:
    """An error of Ray itself, or about a result that cannot be sent."""
    raised = FFSplitError(f"Ray: {type(error).__name__}: {reason_of(error)}")
    raised.__cause__ = error
    return raised
