"""What a worker reports while it works: log lines, and counters that Prometheus reads from every node."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ray.util.metrics import Counter

from ffsplit import logs, streams
from ffsplit.distributed.alike import check_alike, versions_here
from ffsplit.distributed.runner import Worker, working_on
from ffsplit.redaction import guarded
from ffsplit.store.scratch import Result

COUNTERS = {
    "ffsplit_shards_done": "Items of a stage (shards of text, layers and others) that were computed",
    "ffsplit_tokens": "Tokens of text that were read",
    "ffsplit_bytes": "Bytes of results that were stored",
    "ffsplit_failures": "Items that raised an error, and workers that were lost",
}


@dataclass(frozen=True)
class Observed:
    """Calls a worker in any process, with the driver's log settings and fields."""

    stage: str
    log_format: logs.LogFormat
    fields: dict[str, logs.Field]
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the driver's packages. A process with others does no work."""

    @classmethod
    def here(cls, stage: str) -> Observed:
        """With this process's log settings, fields and versions."""
        return cls(stage, logs.asked_for(), logs.current(), versions_here())

    def __call__(self, worker: Worker[Any, Any], item: Any) -> Any:
        logs.set_up(self.log_format)
        name = getattr(item, "name", None)
        with logs.fields(**self.fields, stage=self.stage, item=name if isinstance(name, str) else None):
            logs.log("taken")
            try:
                check_alike(self.versions)
                with working_on(self.stage, item):
                    answer = guarded(worker, item)
            except Exception as error:
                count("ffsplit_failures", 1, stage=self.stage)
                cause = error.__cause__ or error
                logs.log("failed", level=logging.ERROR, error=type(cause).__name__)
                raise
            logs.log("answered")
            self._count(answer)
            return answer

    def lost(self, reason: str) -> None:
        """Log that a worker was lost, in the driver."""
        count("ffsplit_failures", 1, stage=self.stage)
        with logs.fields(**self.fields, stage=self.stage):
            logs.log("lost", level=logging.WARNING, reason=reason)

    def placed(self, where: str) -> None:
        """Report, in the driver, which GPU a worker has."""
        with logs.fields(**self.fields, stage=self.stage):
            logs.log("placed", where=where)
        if self.log_format == "text":
            streams.note(f"{self.stage}: a worker on {where}")

    def _count(self, answer: Any) -> None:
        if isinstance(answer, Result) and answer.reused:
            return
        count("ffsplit_shards_done", 1, stage=self.stage)
        if isinstance(answer, Result):
            tokens = answer.facts.get("num_tokens", 0)
            count("ffsplit_tokens", tokens if isinstance(tokens, int) else 0, stage=self.stage)
            count("ffsplit_bytes", sum(entry.size_bytes for entry in answer.files), stage=self.stage)


def count(name: str, value: int, *, stage: str) -> None:
    """Add to one of COUNTERS."""
    if value > 0:
        _counter(name).inc(value, tags={"stage": stage})


@cache
def _counter(name: str) -> Counter:
    return Counter(name, description=COUNTERS[name], tag_keys=("stage",))
