"""How often a model of a batch is tried, and with what: retries, and once more with less memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ffsplit.config import JobConfig
from ffsplit.exit_codes import DONE, MISTAKE, REFUSED
from ffsplit.zoo.process import Ended


class Lean(NamedTuple):
    """A job that holds less in memory at once, and what is different about it."""

    job: JobConfig
    how: str


class Next(NamedTuple):
    """Another attempt: after how long, and the line that reports it."""

    wait_s: float
    told: str


class Attempts:
    """The attempts at one model. `job` is that of the next one, `outcome` how the model has ended so far.

    A failure is retried `retries` times, unless it is the user's mistake. The first time that memory runs
    out, the next attempt needs less of it, whatever `retries` is; the second time, the model has failed.
    """

    def __init__(self, job: JobConfig, *, retries: int, backoff_s: float) -> None:
        self.job, self._asked = job, job
        self.less_memory: str | None = None
        self.number = 0
        self.outcome: Ended | None = None
        self._retries, self._backoff_s = retries, backoff_s
        self._num_failures = 0
        self._ran_out: Ended | None = None
        self._ways: Iterator[Lean] = iter(())

    def follow(self, ended: Ended) -> Next | None:
        """What follows an attempt: another one, or None if `outcome` is final."""
        self.number += 1
        self.outcome = ended
        if self._ran_out is None and ended.is_out_of_memory:
            self._ran_out, self._ways = ended, leaner(self.job)
            if (lean := self._with_less()) is not None:
                return lean
        elif self._ran_out is not None and ended.exit_code == MISTAKE:  # this model cannot be run so
            self.outcome = ended = self._ran_out
            if (lean := self._with_less()) is not None:
                return lean
        elif ended.exit_code in (DONE, REFUSED, MISTAKE) or ended.is_out_of_memory:
            return None
        self._num_failures += 1
        if self._num_failures > self._retries:
            return None
        wait_s = self._backoff_s * 2 ** (self._num_failures - 1)
        return Next(wait_s, f"failed, retry in {wait_s:g} s: {ended.last_words}")

    def _with_less(self) -> Next | None:
        """The next way to need less memory; None, and the job as asked for, if none is left."""
        assert self._ran_out is not None
        lean = next(self._ways, None)
        self.job, self.less_memory = (self._asked, None) if lean is None else lean
        if lean is None:
            return None
        told = f"out of memory, retry in {self._backoff_s:g} s {lean.how}: {self._ran_out.last_words}"
        return Next(self._backoff_s, told)


def leaner(job: JobConfig) -> Iterator[Lean]:
    """The ways to run a job with less memory, the better one first.

    Half the workers give the same bytes and measurements, so they come first where workers share the memory
    of a host. A worker on a GPU has that GPU's memory to itself, so there the model is divided first.
    """
    halved, divided = list(_halved(job)), list(_divided(job))
    on_gpu = job.device == "cuda" or job.gpus_per_worker > 0
    yield from divided + halved if on_gpu else halved + divided


def _halved(job: JobConfig) -> Iterator[Lean]:
    workers = job.workers or 1
    if job.runner == "ray" and workers > 1:
        half = workers // 2
        how = f"with {half} worker{'s' if half > 1 else ''} instead of {workers}"
        yield Lean(job.model_copy(update={"workers": half}), how)


def _divided(job: JobConfig) -> Iterator[Lean]:
    if not job.block_by_block:
        yield Lean(job.model_copy(update={"block_by_block": True}), "block by block")
