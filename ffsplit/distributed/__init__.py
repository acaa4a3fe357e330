"""Where stages run. Nothing outside this package imports ray."""

from __future__ import annotations

from ffsplit.config import JobConfig
from ffsplit.distributed.runner import Runner, SerialRunner
from ffsplit.errors import ConfigError


def make_runner(config: JobConfig, *, workers_here: int | None = None) -> Runner:
    """The runner a job asks for. Ray is imported only if it is used.

    `workers_here` is how many workers a new local cluster has room for, if known.
    """
    if config.runner == "serial":
        if config.accelerator_type is not None:
            raise ConfigError(
                f"--accelerator-type {config.accelerator_type} chooses nodes of a cluster, which "
                "--runner serial does not use: omit one of them"
            )
        return SerialRunner()
    from ffsplit.distributed.ray_runner import RayRunner

    gpus = config.gpus_per_worker
    if config.device == "cuda" and gpus == 0:
        gpus = 1.0
    return RayRunner(
        address=config.address,
        num_workers=config.workers,
        workers_here=workers_here,
        threads_per_worker=config.threads_per_worker,
        gpus_per_worker=gpus,
        accelerator_type=config.accelerator_type,
        processes_together=config.healing_workers,
    )
