"""The results of a batch, as records, stored as <destination>/batches/<id>.json."""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Literal

from pydantic import Field

from ffsplit.config import Record
from ffsplit.errors import ArtifactError
from ffsplit.exit_codes import DONE, FAILED, INTERRUPTED, REFUSED
from ffsplit.measurement.gates import HEADLINES
from ffsplit.report.humanize import noise
from ffsplit.store.manifest import GateResult, Latency, Manifest, Measurements, Spread
from ffsplit.store.schema import Versioned, read_record
from ffsplit.store.store import MissingKey, Store, read_at_most

BATCHES_PREFIX, INDEX_NAME = "batches", "index.html"
MAX_BATCH_BYTES = 256 << 20
BATCH_ID = r"^\d{8}T\d{6}Z-[0-9a-f]{6}$"
NUM_PAST_BATCHES = 20
"""How many earlier batches the index shows."""

_STAMP = "%Y%m%dT%H%M%SZ"

State = Literal["published", "committed already", "refused", "failed", "interrupted"]
"""The outcome of a model. `interrupted`: the batch stopped before this model finished, or started."""
STATES: dict[State, str] = {
    "published": "published",
    "committed already": "published before",
    "refused": "refused by gates",
    "failed": "failed",
    "interrupted": "interrupted",
}


class Figures(Record):
    """One model's measurements, original and compressed. Task scores are in the task's own unit."""

    parameters: tuple[int, int]
    size_bytes: tuple[int, int] = Field(description="all safetensors files")
    speedups: dict[str, float] = Field(description="by shape, as in 8x128")
    spreads: dict[str, Spread] = Field(default={}, description="of the speed-ups")
    noise: str | None = Field(default=None, description="what disturbed the timings")
    fidelity: dict[str, float]
    tasks: dict[str, tuple[float, float]] = Field(description="by task and metric")

    @classmethod
    def of(cls, measured: Measurements) -> Figures:
        before, after = measured.original_size, measured.compressed_size
        return cls(
            parameters=(before.num_parameters, after.num_parameters),
            size_bytes=(before.file_bytes, after.file_bytes),
            speedups={_shape(each): each.speedup for each in measured.latency},
            spreads={_shape(each): each.spread for each in measured.latency if each.spread is not None},
            noise=noise(measured.latency, measured.load),
            fidelity=measured.fidelity,
            tasks={
                f"{each.name}, {each.metric}": (each.original, each.compressed) for each in measured.tasks
            },
        )


def _shape(each: Latency) -> str:
    return f"{each.batch_size}x{each.num_tokens}"


class StageUse(Record):
    """What one stage of a run reserved, in seconds of CPU cores and of GPUs."""

    name: str
    wall_s: float
    cpu_s: float
    gpu_s: float


class ModelResult(Record):
    """The result that one model's process writes at its end: published or refused."""

    state: Literal["published", "committed already", "refused"]
    run_key: str
    attempt: str
    report: str = Field(description="the key of its report, relative to the model's own destination")
    keep: float | None
    figures: Figures | None
    gates: tuple[GateResult, ...]
    commit: str | None = Field(default=None, description="of a model on the hub")
    inputs: dict[str, str] = Field(
        default={}, description="digests of what the run key depends on: two runs differ where these do"
    )
    stages: tuple[StageUse, ...] = Field(default=(), description="of the attempt that finished")
    gpu: str | None = Field(default=None, description="the name of the GPU that measured, or the driver's")

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        *,
        state: Literal["published", "committed already", "refused"],
        report: str,
    ) -> ModelResult:
        measured = manifest.measurements
        hardware = manifest.environment.hardware | (measured.hardware if measured else {})
        gpu = hardware.get("gpu")
        return cls(
            state=state,
            run_key=manifest.run_key,
            attempt=manifest.attempt,
            report=report,
            keep=manifest.keep,
            figures=None if measured is None else Figures.of(measured),
            gates=manifest.gates,
            commit=manifest.model.revision,
            inputs=manifest.inputs,
            stages=tuple(
                StageUse(name=each.name, wall_s=each.wall_s, cpu_s=each.cpu_s, gpu_s=each.gpu_s)
                for each in manifest.stages
            ),
            gpu=None if gpu is None else str(gpu),
        )


class Difference(Record):
    """One figure of the result in use, and of the new one."""

    what: str = Field(description="size, speed-up at 8x128, a measure of fidelity, or a task and metric")
    unit: Literal["bytes", "times", "fidelity", "score"]
    before: float
    after: float


Outcome = Literal["promoted", "in use", "refused", "held", "failed"]
OUTCOMES: dict[Outcome, str] = {
    "promoted": "now in use",
    "in use": "in use",
    "refused": "not in use: a regression gate failed",
    "held": "not in use: it was before, and was replaced",
    "failed": "not in use: the alias could not be moved",
}


class Promotion(Record):
    """Whether a result replaced the one in use."""

    alias: str
    outcome: Outcome
    current: str | None = Field(default=None, description="the run that was in use, if another was")
    gates: tuple[GateResult, ...] = Field(default=(), description="compared with the current run")
    differences: tuple[Difference, ...] = Field(default=(), description="from the current run")
    error: str | None = None


def describe_promotion(promotion: Promotion) -> str:
    """One line: what the alias names now, and why."""
    current = promotion.current or "nothing"
    before = "" if promotion.current is None else f" (before: {current})"
    return {
        "promoted": f"{promotion.alias} names it now{before}",
        "in use": f"{promotion.alias} names it already",
        "refused": f"{promotion.alias} stays at {current}: a regression gate failed",
        "held": f"{promotion.alias} stays at {current}: it was moved away from this run by hand",
        "failed": f"{promotion.alias} could not be moved: {promotion.error}",
    }[promotion.outcome]


class Cost(Record):
    """What a model used in this batch. `price` is None without prices for all of it."""

    stages: tuple[StageUse, ...]
    cpu_s: float
    gpu_s: float
    price: float | None = Field(description="in the unit of the zoo file's prices")


class BatchModel(Record):
    """One model of a batch. A failed model has an error and no result."""

    name: str
    model: str
    recipe: str
    state: State
    result: ModelResult | None
    error: str | None
    num_attempts: int
    wall_s: float = Field(description="of all attempts, without the waits between them")
    revision: str | None = Field(default=None, description="of a model on the hub: branch, tag or commit")
    commit: str | None = Field(default=None, description="what the revision named when the batch began")
    less_memory: str | None = Field(
        default=None, description="how it was tried once more after it ran out of memory; None if it did not"
    )
    promotion: Promotion | None = Field(default=None, description="None without `promote`")
    cost: Cost | None = Field(default=None, description="None if nothing was computed, or it failed")


class Batch(Versioned):
    """One pass over a zoo."""

    id: str = Field(pattern=BATCH_ID, description="sorts by the time it began")
    zoo: str
    zoo_digest: str
    destination: str
    started_at: str = Field(description="UTC, ISO 8601")
    finished_at: str
    ffsplit_version: str
    max_models_in_flight: int
    models: tuple[BatchModel, ...]

    @property
    def price(self) -> float | None:
        """The price of all models that were computed, None if that of one is not known."""
        costs = [model.cost.price for model in self.models if model.cost is not None]
        return None if None in costs or not costs else sum(price for price in costs if price is not None)

    def moved(self, *outcomes: Outcome) -> int:
        """How many models' promotions ended so."""
        return sum(
            model.promotion is not None and model.promotion.outcome in outcomes for model in self.models
        )

    def count(self, *states: State) -> int:
        return sum(model.state in states for model in self.models)

    @property
    def exit_code(self) -> int:
        """130 if the batch was interrupted, else 1 if a model or its promotion failed, 3 if gates refused
        one, 0 if all are published."""
        if self.count("interrupted"):
            return INTERRUPTED
        if self.count("failed") or self.moved("failed"):
            return FAILED
        return REFUSED if self.count("refused") or self.moved("refused") else DONE


def new_batch_id(now: datetime, *, after: str | None = None) -> str:
    """A name that sorts after the one of an earlier batch, whatever the clock says."""
    now = now.astimezone(timezone.utc)
    if after is not None:
        before = datetime.strptime(after.partition("-")[0], _STAMP).replace(tzinfo=timezone.utc)
        now = max(now, before + timedelta(seconds=1))
    return f"{now:{_STAMP}}-{secrets.token_hex(3)}"


def batch_key(batch_id: str) -> str:
    return f"{BATCHES_PREFIX}/{batch_id}.json"


def save_batch(store: Store, batch: Batch) -> None:
    store.put_bytes(batch_key(batch.id), (batch.model_dump_json(indent=2) + "\n").encode())


def batch_ids(store: Store) -> list[str]:
    """The names of all batches, in the order in which they began."""
    names = (
        key.removeprefix(f"{BATCHES_PREFIX}/").removesuffix(".json") for key in store.list(BATCHES_PREFIX)
    )
    return sorted(name for name in names if re.fullmatch(BATCH_ID, name))


def past_batches(store: Store, *, before: str | None = None) -> list[Batch]:
    """The newest batches (that began before a given one), oldest first. Unreadable ones are left out."""
    ids = [each for each in batch_ids(store) if before is None or each < before]
    batches = []
    for key in map(batch_key, ids[-NUM_PAST_BATCHES:]):
        with suppress(MissingKey, ArtifactError):
            batches.append(read_record(Batch, read_at_most(store, key, MAX_BATCH_BYTES), name=key))
    return batches


def headline(figures: Figures) -> float | None:
    """The main fidelity figure, as in a run's report."""
    return next((figures.fidelity[name] for name in HEADLINES if name in figures.fidelity), None)


def slowest(figures: Figures) -> float | None:
    """The smallest speed-up over all shapes."""
    return min(figures.speedups.values(), default=None)
