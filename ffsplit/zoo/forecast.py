"""What a batch would do: which models it would compute, why, and what that would cost. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ffsplit.config import Record
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.models.load_options import attending, trusting
from ffsplit.run.checks import check_rows
from ffsplit.run.job import Run, prepare
from ffsplit.run.needs import Needs
from ffsplit.store.artifact import locate, read_manifest
from ffsplit.store.commits import list_commits
from ffsplit.store.manifest import Manifest
from ffsplit.store.store import Store, open_store
from ffsplit.zoo.batch import BatchModel, Cost, StageUse, past_batches
from ffsplit.zoo.comparison import reasons, short
from ffsplit.zoo.costs import cost_of_stages
from ffsplit.zoo.zoo_file import Zoo, ZooModel

Action = Literal["run", "skip", "cannot run"]


class ModelForecast(Record):
    """What a batch would do with one model, and why."""

    name: str
    action: Action
    reasons: tuple[str, ...] = Field(description="why it would run; or the one reason why not")
    run_key: str | None = None
    commit: str | None = Field(default=None, description="of a model on the hub")
    seconds: float | None = Field(default=None, description="estimated, by this machine's speed")
    cost: Cost | None = Field(default=None, description="estimated; None if a stage's time is not known")


class BatchForecast(Record):
    """What a batch would do."""

    zoo: str
    destination: str
    models: tuple[ModelForecast, ...]

    def count(self, action: Action) -> int:
        return sum(model.action == action for model in self.models)

    @property
    def price(self) -> float | None:
        """The sum over the models that would run; None if that of one is not known."""
        prices = [None if each.cost is None else each.cost.price for each in self._running]
        return None if None in prices or not prices else sum(price for price in prices if price is not None)

    @property
    def seconds(self) -> float | None:
        seconds = [each.seconds for each in self._running]
        return None if None in seconds or not seconds else sum(each for each in seconds if each is not None)

    @property
    def _running(self) -> list[ModelForecast]:
        return [model for model in self.models if model.action == "run"]


def forecast(zoo: Zoo, commits: Mapping[int, str], *, workers: int | None = None) -> BatchForecast:
    """What a batch of this zoo would do now. `commits` are those of `at_commits`, by index.

    Hub models are downloaded into the cache, since their bytes decide the run key.
    """
    last = _last_results(zoo)
    models = [
        _of_model(model, zoo.prices, commits.get(index), last.get(model.name), workers=workers)
        for index, model in enumerate(zoo.models)
    ]
    return BatchForecast(zoo=zoo.name, destination=zoo.destination, models=tuple(models))


def _last_results(zoo: Zoo) -> dict[str, BatchModel]:
    """Each model's entry in the newest batch that has it."""
    batches = past_batches(open_store(zoo.destination))
    return {model.name: model for batch in batches for model in batch.models}


def _of_model(
    model: ZooModel,
    prices: Mapping[str, float],
    commit: str | None,
    last: BatchModel | None,
    *,
    workers: int | None,
) -> ModelForecast:
    job = model.job if workers is None else model.job.model_copy(update={"workers": workers})
    try:
        with trusting(job.trust_remote_code), attending(job.attn_implementation):
            run = prepare(job)
            key, store = run.keys.run, open_store(job.out)
            before = [each for each in list_commits(store) if each.kind == "model"]
            if any(each.run_key == key for each in before):
                why = f"run {key} is committed"
                return ModelForecast(
                    name=model.name, action="skip", reasons=(why,), run_key=key, commit=commit
                )
            check_rows(run)
            run.needs.check()
            newest = _read(store, before[-1].run_key) if before else None
            found = _why(run, newest, last)
            stages = _stages(run, run.needs)
    except FFSplitError as error:
        return ModelForecast(name=model.name, action="cannot run", reasons=(str(error),), commit=commit)
    return ModelForecast(
        name=model.name,
        action="run",
        reasons=found,
        run_key=key,
        commit=commit,
        seconds=run.needs.totals.seconds,
        cost=None if stages is None else cost_of_stages(stages, prices, gpu=None),
    )


def _read(store: Store, run_key: str) -> Manifest | None:
    try:
        return read_manifest(locate(f"{store.uri}/{run_key}"))
    except ConfigError:
        return None


def _why(run: Run, newest: Manifest | None, last: BatchModel | None) -> tuple[str, ...]:
    """Why this run has no result yet, compared with the newest model, or with the last batch."""
    if last is not None and last.result is not None and last.result.run_key == run.keys.run:
        return ("its gates refused it in the last batch; finished stages are reused",)
    failed = () if last is None or last.state not in ("failed", "interrupted") else (f"{last.state} before",)
    if newest is None:
        return ("never run", *failed)
    found = reasons(newest.inputs, run.keys.inputs)
    old, new = newest.model.revision, run.located.revision
    if old and new and old != new:
        moved = f"new revision {short(new)} (before: {short(old)})"
        found = (moved, *(each for each in found if each != "new model"))
    return (*found, *failed) or ("another run is the newest",)


def _stages(run: Run, needs: Needs) -> tuple[StageUse, ...] | None:
    """The estimated use of every stage; None if the time of one is not known."""
    threads = run.profile.threads
    gpus = run.config.gpus_per_worker if run.profile.device == "cuda" else 0
    uses = []
    for stage in needs.stages:
        if stage.seconds is None:
            return None
        cpus = run.healing_threads if stage.name == "heal" else threads
        uses.append(
            StageUse(
                name=stage.name,
                wall_s=stage.seconds,
                cpu_s=stage.seconds * stage.num_workers * cpus,
                gpu_s=stage.seconds * stage.num_workers * gpus,
            )
        )
    return tuple(uses)
