"""What the end of a call means for its slot. No Ray is started: its errors are made here."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    RaySystemError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from ffsplit import __version__
from ffsplit.distributed.dispatch import Done, Event, Failed, Lost, Ready
from ffsplit.distributed.observing import Observed
from ffsplit.distributed.ray_pools import OUT_OF_MEMORY, ActorPool, TaskPool
from ffsplit.errors import CalibrationError, FFSplitError, OutOfMemoryError


class Reference:
    """A call in flight, as Ray gives it."""

    def __init__(self) -> None:
        self.ending: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.ending


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> TaskPool:
    monkeypatch.setattr(Observed, "lost", lambda self, reason: lost.append(reason))
    lost.clear()
    return TaskPool(lambda item: item, stage="s", room=lambda: 2, options=dict)


lost: list[str] = []


def event_of(
    pool: TaskPool, *, result: Any = None, error: Exception | None = None, ready: bool = False
) -> Event:
    slot, reference = pool.open(), Reference()
    assert pool.next_event(0) == Ready(slot) and pool.next_event(0) is None
    pool._watch(slot, reference, ready=ready)
    if error is None:
        reference.ending.set_result(result)
    else:
        reference.ending.set_exception(error)
    event = pool.next_event(0)
    assert event is not None and event.slot == slot
    return event


def test_a_call_that_ends_frees_its_slot(pool: TaskPool) -> None:
    assert event_of(pool, result=7) == Done(0, 7)
    assert event_of(pool, ready=True) == Ready(1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WorkerCrashedError(), "its process died"),
        (NodeDiedError("gone"), "its host left"),
        (ObjectLostError("id", None, ""), "its answer was lost with its host"),
    ],
)
def test_a_slot_is_lost_with_its_process_or_host(pool: TaskPool, error: Exception, reason: str) -> None:
    assert event_of(pool, error=error) == Lost(0, reason)
    assert lost == [reason]


@pytest.mark.parametrize("is_actor", [True, False])
def test_a_host_without_this_package_counts_as_lost(pool: TaskPool, is_actor: bool) -> None:
    """Others may have it. Its last words are those of Ray, in an actor as in a task."""
    said = "ray.exceptions.RaySystemError: System error: No module named 'ffsplit'\ntraceback: ..."
    task = RayTaskError("f", said, RaySystemError("No module named 'ffsplit'"))
    event = event_of(pool, error=ActorDiedError(task) if is_actor else task)
    assert isinstance(event, Lost)
    assert event.reason == f"its host has no ffsplit: install ffsplit {__version__} on every node"
    other = RayTaskError("f", "No module named 'a'", CalibrationError("No module named 'a'"))
    assert isinstance(event_of(pool, error=other), Failed), "what a model's own code lacks"


def test_a_slot_that_is_lost_for_memory_says_so(pool: TaskPool) -> None:
    error = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory")
    assert event_of(pool, error=error) == Lost(0, OUT_OF_MEMORY, OutOfMemoryError)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RayTaskError("f", "trace", CalibrationError("no tokens")), CalibrationError, "^no tokens$"),
        (RayTaskError("f", "trace", KeyError("a")), FFSplitError, "^Ray: KeyError: KeyError: 'a'$"),
        (TaskCancelledError(), FFSplitError, "^Ray: TaskCancelledError: "),
    ],
)
def test_an_error_ends_the_stage(
    pool: TaskPool, error: Exception, kind: type[FFSplitError], message: str
) -> None:
    event = event_of(pool, error=error)
    assert isinstance(event, Failed) and type(event.error) is kind and event.error.__cause__ is error
    with pytest.raises(kind, match=message):
        raise event.error
    assert lost == []


def test_a_fault_of_our_own_ends_the_stage(pool: TaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Observed, reason: str) -> None:
        raise KeyError("a fault of our own")

    monkeypatch.setattr(Observed, "lost", fail)
    event = event_of(pool, error=WorkerCrashedError())
    assert isinstance(event, Failed) and isinstance(event.error, KeyError)


def test_a_slot_that_was_closed_tells_nothing_more(pool: TaskPool) -> None:
    reference = Reference()
    slot = pool.open()
    pool.next_event(0)
    pool._watch(slot, reference)
    pool._running.clear()
    reference.ending.set_result(7)
    assert pool.next_event(0) is None


def test_a_slot_that_never_began_is_closed_without_ray(pool: TaskPool) -> None:
    pool.close(pool.open())
    actors = ActorPool(lambda: lambda item: item, stage="s", room=lambda: 2, options=dict)
    actors.close(3)
    assert actors.next_event(0) is None
