"""Several processes that work on one item together, started by Ray Train.

They communicate through torch.distributed: gloo on CPUs, NCCL on GPUs. The function itself stores results and
resume state, so Ray Train stores nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from ffsplit.compat.ray import causes_of
from ffsplit.directories import temporary_folder
from ffsplit.distributed.ray_cluster import Share, hosts, selector
from ffsplit.distributed.ray_pools import kind_of_loss, reason_of_loss
from ffsplit.distributed.runner import Worker
from ffsplit.errors import ConfigError, FFSplitError, reason_of
from ffsplit.redaction import guarded

OLDEST = (2, 60)
"""The oldest Ray that this is known to work with. Older ones may not return a process's result."""
START_TIMEOUT_S = 600
"""Ray Train's default of a minute is short for a busy machine, and for nodes still to be autoscaled."""
MAX_RETRIES = 3
"""How often all processes are restarted after one of them was lost."""


@dataclass(frozen=True)
class Together:
    """A function to be called in `size` processes at once, each with its own CPUs and GPUs.

    The answer is that of the first process. An error that FFSplit raised in any of them is raised again at
    once. If a process is lost, all are restarted.
    """

    function: Worker[Any, Any]
    size: int
    cpus: int
    gpus: float
    accelerator: str | None = None

    def run(self, item: Any) -> Any:
        from ray.train.v2.api.exceptions import TrainingFailedError

        for attempts_left in reversed(range(1 + MAX_RETRIES)):
            try:
                return self._fit(item)
            except TrainingFailedError as error:
                known = next((each for each in _causes(error) if isinstance(each, FFSplitError)), None)
                if known is not None:
                    raise known from error
                if not attempts_left:
                    reasons = [reason for each in _causes(error) if (reason := reason_of_loss(each))]
                    if reasons:
                        raise kind_of_loss(reasons[0])(
                            f"{self.size} processes that work together were lost {1 + MAX_RETRIES} times, "
                            f"the last because {reasons[0]}; finished work is kept, and the same command "
                            "resumes from it"
                        ) from error
                    first = next(iter(_causes(error)), error)
                    raise FFSplitError(
                        f"{self.size} processes together: {type(first).__name__}: {reason_of(first)}"
                    ) from error
        raise AssertionError("unreachable")

    def _fit(self, item: Any) -> Any:
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = (
            "0"  # keep paths relative to the directory the run was started in
        )
        os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        each = {"CPU": float(self.cpus)} | ({"GPU": self.gpus} if self.gpus else {})
        with temporary_folder() as folder:
            trainer = TorchTrainer(
                lambda config: guarded(self.function, config["item"]),
                train_loop_config={"item": item},
                torch_config=TorchConfig(backend="nccl" if self.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=self.size,
                    use_gpu=bool(self.gpus),
                    resources_per_worker=each,
                    **selector(self.accelerator),
                ),
                run_config=RunConfig(storage_path=str(folder), name="together"),
            )
            return trainer.fit().return_value


def place(
    function: Worker[Any, Any],
    *,
    size: int,
    threads: int,
    use_gpus: bool,
    accelerator: str | None = None,
) -> Together:
    """Reserve `threads` CPUs per process (fewer if the cluster is smaller), and a GPU each if asked.

    Raises ConfigError if the cluster has no room for `size` processes at once, or its Ray is too old.
    """
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"--healing-workers {size} needs Ray {oldest} or newer: pip install 'ray[default]>={oldest}'"
        )
    found = [host.resources for host in hosts(Share(1, 0, accelerator))]
    cpus, gpus = (int(sum(each.get(kind, 0) for each in found)) for kind in ("CPU", "GPU"))
    if size > cpus or (use_gpus and size > gpus):
        has = f"{cpus} CPUs and {gpus} GPUs" if use_gpus else f"{cpus} CPUs"
        fitting = max(1, min(cpus, gpus) if use_gpus else cpus)
        raise ConfigError(
            f"--healing-workers {size}: the cluster has {has}: give --healing-workers {fitting}, or a larger "
            "cluster"
        )
    largest = max(int(each["CPU"]) for each in found)
    share = max(1, min(threads, largest, cpus // size))
    return Together(function, size=size, cpus=share, gpus=float(use_gpus), accelerator=accelerator)


def run_together(together: Together, item: Any) -> Any:
    """Run as a task: start the processes and wait for them. They end with the task."""
    return together.run(item)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors of the processes, without Ray Train's wrappers."""
    for failure in getattr(error, "worker_failures", {}).values():
        yield from causes_of(failure)
