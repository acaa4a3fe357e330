"""The runner on Ray: tasks and actors on a cluster, or on one started on the spot."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ffsplit.distributed.ray_train import place, run_together
from ffsplit.distributed.runner import Answer, Item, Worker
from ffsplit.errors import ConfigError, FFSplitError

LOCAL_OBJECT_STORE_BYTES = 200 * 2**20
"""Enough for a local cluster: tensors never pass through the object store."""
MAX_RETRIES = 3
CONNECT_TIMEOUT_S = 10.0


class _Host:
    """An actor that holds one worker."""

    def __init__(self, factory: Callable[[], Worker[Any, Any]]) -> None:
        self._worker = factory()

    def run(self, item: Any) -> Any:
        return self._worker(item)


class RayRunner:
    """Connects on entry, and leaves no actor and no local cluster behind on exit.

    `num_workers` None means one for every `threads_per_worker` CPUs. Raises ConfigError when the
    cluster cannot be reached, or has fewer GPUs than one worker asks for.
    """

    def __init__(
        self,
        *,
        address: str | None,
        num_workers: int | None,
        threads_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        processes_together: int = 1,
    ) -> None:
        self._together = processes_together
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._requested = num_workers
        self._threads, self._gpus = threads_per_worker, gpus_per_worker
        self._workers = 0
        self._connected = False

    @property
    def num_workers(self) -> int:
        return self._workers

    def __enter__(self) -> RayRunner:
        self._connected = not ray.is_initialized()
        if self._connected:
            self._connect()
        resources = ray.cluster_resources()
        if self._gpus > resources.get("GPU", 0):
            self.__exit__(None, None, None)
            raise ConfigError(
                f"--gpus-per-worker {self._gpus:g}: the cluster has {resources.get('GPU', 0):g} GPUs"
            )
        if self._together > 1:
            try:
                place(_Host, size=self._together, threads=1, use_gpus=self._gpus > 0)
            except ConfigError:
                self.__exit__(None, None, None)
                raise
        room = self._room(resources)
        self._workers = max(1, min(self._requested or room, room))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connected:
            ray.shutdown()
            self._connected = False

    def _room(self, resources: Mapping[str, float]) -> int:
        """How many workers the cluster can place at once: an actor without a place would wait for ever."""
        room = int(resources.get("CPU", 1)) // self._threads
        if self._gpus == 0:
            return room
        gpus = int(resources.get("GPU", 0))
        return min(room, gpus * int(1 / self._gpus) if self._gpus < 1 else int(gpus / self._gpus))

    def _connect(self) -> None:
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self._address in (None, "local"):
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            workers = self._requested or max(1, (os.cpu_count() or 1) // self._threads)
            options |= {
                "address": "local",
                "num_cpus": max(workers * self._threads, self._together),
                "include_dashboard": False,
                "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            }
        else:
            options["address"] = self._address
        try:
            _probe(options["address"])
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"Ray at {options['address']} cannot be reached: {reason}") from None

    def map_tasks(
        self, stage: str, function: Worker[Item, Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        task = ray.remote(function).options(
            name=stage, num_cpus=self._threads, num_gpus=self._gpus, max_retries=MAX_RETRIES
        )
        yield from self._stream([task.remote] * self._workers, items)

    def map_workers(
        self, stage: str, factory: Callable[[], Worker[Item, Answer]], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        host = ray.remote(_Host).options(
            name=None,
            num_cpus=self._threads,
            num_gpus=self._gpus,
            max_restarts=MAX_RETRIES,
            max_task_retries=MAX_RETRIES,
        )
        actors = [host.remote(factory) for _ in range(min(self._workers, len(items)))]
        try:
            yield from self._stream([actor.run.options(name=stage).remote for actor in actors], items)
        finally:
            for actor in actors:
                ray.kill(actor)

    def run_alone(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, threads: int = 1
    ) -> Answer:
        cpus = min(threads, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(function).options(
            name=stage, num_cpus=max(cpus, self._threads), num_gpus=self._gpus, max_retries=MAX_RETRIES
        )
        ((_, answer),) = self._stream([task.remote], [item])
        return answer  # type: ignore[no-any-return]

    def run_together(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, size: int, threads: int = 1
    ) -> Answer:
        if size == 1:
            return self.run_alone(stage, function, item, threads=threads)
        together = place(function, size=size, threads=threads, use_gpus=self._gpus > 0)
        task = ray.remote(run_together).options(name=stage, num_cpus=0, max_retries=MAX_RETRIES)
        ((_, answer),) = self._stream([partial(task.remote, together)], [item])
        return answer  # type: ignore[no-any-return]

    def _stream(
        self, slots: Sequence[Callable[[Any], Any]], items: Sequence[Item]
    ) -> Iterator[tuple[int, Any]]:
        """Keep one item in flight in every slot; a slot that answers takes the next item."""
        waiting = iter(enumerate(items))
        running: dict[Any, tuple[int, Callable[[Any], Any]]] = {}

        def start(slot: Callable[[Any], Any]) -> None:
            following = next(waiting, None)
            if following is not None:
                index, item = following
                running[slot(item)] = (index, slot)

        for slot in slots:
            start(slot)
        try:
            while running:
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                index, slot = running.pop(done)
                answer = _get(done)
                start(slot)
                yield index, answer
        finally:
            for reference in running:
                ray.cancel(reference, force=False)


def _probe(address: str) -> None:
    """Raise OSError unless something listens at host:port, where Ray itself would try for minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _get(reference: Any) -> Any:
    """A task's answer; an error that FFSplit raised in the task is raised as itself."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FFSplitError):
            raise error.cause from None
        raise
