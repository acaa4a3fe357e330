"""The runner on Ray: tasks and actors on a cluster, existing or started locally."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ffsplit.compat.ray import EVERY_NODE_HAS
from ffsplit.directories import remove_abandoned
from ffsplit.distributed.alike import check_host, install, missing_package, versions_here
from ffsplit.distributed.dispatch import Pool, dispatch
from ffsplit.distributed.observing import Observed
from ffsplit.distributed.ray_cluster import (
    CLIENT_SCHEME,
    Host,
    Share,
    check_room,
    connect,
    disconnect,
    hosts,
    one_kind,
    room,
    selector,
)
from ffsplit.distributed.ray_pools import (
    ActorPool,
    TaskPool,
    error_of,
    kind_of_loss,
    reason_of_loss,
    run_task,
)
from ffsplit.distributed.ray_train import Together, place, run_together
from ffsplit.distributed.runner import ANSWER_WITHIN_S, Answer, Item, Worker
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.machine import num_workers_here

PRESENCE, A_LITTLE = f"{EVERY_NODE_HAS}ffsplit", 0.0001
"""Every node has 1 of this resource. A worker takes a little; work that needs a host alone takes all."""


class RayRunner:
    """Connects on entry, and leaves no actor and no local cluster behind on exit.

    At most `num_workers` items run at once, and no more than the cluster has room for at the moment: a
    running stage uses nodes that join, and continues without those that leave. None means one worker for
    every `threads_per_worker` CPUs. A local cluster has CPUs for `workers_here` workers, by default as many
    as this machine has cores for. Raises ConfigError if the cluster cannot be reached, or not even one worker
    fits.
    """

    def __init__(
        self,
        *,
        address: str | None,
        num_workers: int | None,
        workers_here: int | None = None,
        threads_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        accelerator_type: str | None = None,
        processes_together: int = 1,
    ) -> None:
        self._together = processes_together
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._requested, self._workers_here = num_workers, workers_here
        self._share = Share(threads_per_worker, gpus_per_worker, accelerator_type)
        self._connected = False
        self._streams: list[Generator[tuple[int, Any], None, None]] = []

    @property
    def num_workers(self) -> int:
        found = room(self._share)
        return found if self._requested is None else min(self._requested, found)

    @property
    def address(self) -> str:
        """For other processes of this machine, to connect to the same cluster."""
        return str(self._address if self._is_client else ray.get_runtime_context().gcs_address)

    @property
    def _is_client(self) -> bool:
        """Whether this process is no part of the cluster."""
        return bool(self._address and self._address.startswith(CLIENT_SCHEME))

    @property
    def is_spread(self) -> bool:
        if self._is_client:
            return True
        here = ray.get_runtime_context().get_node_id()
        return any(host.id != here for host in hosts(self._share))

    def __enter__(self) -> RayRunner:
        if not ray.is_initialized():
            workers = self._workers_here or num_workers_here(
                self._requested, threads=self._share.cpus, on_gpu=self._share.gpus > 0
            )
            connect(self._address, num_cpus=max(workers * self._share.cpus, self._together))
            if self._address in (None, "local"):
                self._requested = workers  # healing together may need more CPUs, but workers do not
            self._connected = True
        try:
            check_room(self._share)
            if self._connected and self._address not in (None, "local"):
                self.on_every_host("hosts", check_host, versions_here())
            if self._together > 1:
                self._place(lambda item: item, size=self._together, threads=1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in list(self._streams):  # a stream's reader removes it from the list
            with suppress(ValueError):  # one that is being closed already
                stream.close()
        if self._connected:
            disconnect()
            self._connected = False
        remove_abandoned()  # folders of killed workers; workers are killed when their stage ends

    def map_tasks(
        self, stage: str, function: Worker[Item, Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        pool = TaskPool(function, stage=stage, room=lambda: self.num_workers, options=self._options)
        return self._dispatch(pool, items, stage=stage)

    def map_workers(
        self,
        stage: str,
        factory: Callable[[], Worker[Item, Answer]],
        items: Sequence[Item],
        *,
        lanes: int = 1,
    ) -> Iterator[tuple[int, Answer]]:
        pool = ActorPool(
            factory, stage=stage, room=lambda: self.num_workers, options=self._options, lanes=lanes
        )
        return self._dispatch(pool, items, stage=stage)

    def run_alone(
        self,
        stage: str,
        function: Worker[Item, Answer],
        item: Item,
        *,
        threads: int = 1,
        reserved: bool = False,
    ) -> Answer:
        pool = TaskPool(
            function,
            stage=stage,
            room=lambda: min(1, self.num_workers),
            options=lambda: self._options_alone(threads=threads, reserved=reserved),
        )
        ((_, answer),) = self._dispatch(pool, [item], stage=stage)
        return answer  # type: ignore[no-any-return]

    def on_every_host(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, within_s: float = ANSWER_WITHIN_S
    ) -> dict[str, Answer]:
        task, observed = ray.remote(run_task), Observed.here(stage)
        asked = hosts(self._share)
        references = [
            task.options(
                name=stage,
                num_cpus=0,
                max_retries=0,  # a lost node does not come back, and one without memory may kill it for ever
                scheduling_strategy=NodeAffinitySchedulingStrategy(host.id, soft=False),
            ).remote(observed, function, item)
            for host in asked
        ]
        late: list[Any] = []
        if references:  # a cluster that has not grown yet may have no host
            _, late = ray.wait(references, num_returns=len(references), timeout=within_s)
        answers, silent = {}, []
        for host, reference in zip(asked, references, strict=True):
            if reference in late:
                ray.cancel(reference, force=True)
                silent.append(host)
                continue
            try:
                answers[host.name] = ray.get(reference, timeout=within_s)
            except RayTaskError as error:
                if (package := missing_package(error)) is not None:
                    raise ConfigError(f"host {host.name} {install(package)}") from error
                raise error_of(error) from error
            except RayError as error:
                if _is_there(host):
                    why = reason_of_loss(error) or str(error).splitlines()[0]
                    raise kind_of_loss(why)(f"{stage}: host {host.name} did not answer: {why}") from None
        if there := [host.name for host in silent if _is_there(host)]:
            raise FFSplitError(
                f"{stage}: {len(there)} of {len(asked)} hosts did not answer in {within_s:g} s ({there[0]}): "
                "stop that node, or fix what blocks it, and run again"
            )
        return answers

    def run_together(
        self, stage: str, function: Worker[Item, Answer], item: Item, *, size: int, threads: int = 1
    ) -> Answer:
        if size == 1:
            return self.run_alone(stage, function, item, threads=threads)
        together = self._place(function, size=size, threads=threads)
        pool = TaskPool(
            partial(run_together, together),
            stage=stage,
            room=lambda: 1,
            options=lambda: {"num_cpus": 0},
        )
        ((_, answer),) = self._dispatch(pool, [item], stage=stage)
        return answer  # type: ignore[no-any-return]

    def _dispatch(self, pool: Pool[Any], items: Sequence[Item], *, stage: str) -> Iterator[tuple[int, Any]]:
        """The stream of a stage's answers. It is closed on exit if nobody reads it to its end."""
        stream: Any = dispatch(pool, items, stage=stage)
        self._streams.append(stream)
        try:
            yield from stream
        finally:
            stream.close()
            self._streams.remove(stream)

    def _options(self) -> dict[str, Any]:
        return {
            "num_cpus": self._share.cpus,
            "num_gpus": self._share.gpus,
            "resources": {PRESENCE: A_LITTLE},
            **selector(self._share.accelerator),
        }

    def _place(self, function: Worker[Any, Any], *, size: int, threads: int) -> Together:
        use_gpus = self._share.gpus > 0
        accelerator = self._share.accelerator
        return place(function, size=size, threads=threads, use_gpus=use_gpus, accelerator=accelerator)

    def _options_alone(self, *, threads: int, reserved: bool) -> dict[str, Any]:
        """Reserve `threads` CPUs, fewer if no host has that many.

        A host is reserved for timings. So if the cluster has several kinds of GPU, it is always of the same.
        """
        share = self._share
        if reserved and share.gpus and share.accelerator is None:
            share = replace(share, accelerator=one_kind(share))
        largest = max((int(host.resources["CPU"]) for host in hosts(share)), default=0)
        cpus = max(share.cpus, min(threads, largest))
        presence = 1.0 if reserved else A_LITTLE
        alone = {"num_cpus": cpus, "resources": {PRESENCE: presence}}
        return self._options() | alone | selector(share.accelerator)


def _is_there(host: Host) -> bool:
    """Whether a host is still part of the cluster. One that left meanwhile need not answer."""
    return any(node["NodeID"] == host.id and node["Alive"] for node in ray.nodes())
