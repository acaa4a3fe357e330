"""A batch: every model in its own process, a bounded number of them at once, on one cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Literal

from ffsplit import __version__, streams
from ffsplit.config import JobConfig
from ffsplit.directories import by_name
from ffsplit.distributed.ray_cluster import share_cluster
from ffsplit.errors import FFSplitError, begun
from ffsplit.exit_codes import DONE, FAILED, REFUSED
from ffsplit.measurement.gates import describe_result
from ffsplit.redaction import without_credentials
from ffsplit.store.aliases import this_user
from ffsplit.store.manifest import GateResult
from ffsplit.store.store import Store, open_store
from ffsplit.zoo.attempts import Attempts
from ffsplit.zoo.batch import (
    INDEX_NAME,
    Batch,
    BatchModel,
    batch_ids,
    describe_promotion,
    new_batch_id,
    past_batches,
    save_batch,
)
from ffsplit.zoo.costs import cost_of
from ffsplit.zoo.events import Events, Name
from ffsplit.zoo.page import render_index
from ffsplit.zoo.process import Ended, run_process
from ffsplit.zoo.promotion import promote_result
from ffsplit.zoo.revisions import at_commits
from ffsplit.zoo.turns import own_turn
from ffsplit.zoo.zoo_file import Zoo, ZooModel

Say = Callable[[str], None]


@dataclass
class _Pass:
    """One pass over a zoo, and which of its models have ended so far."""

    zoo: Zoo
    store: Store
    say: Say
    started: datetime
    ended: dict[int, BatchModel] = field(default_factory=dict)
    """By the model's index in the file."""
    commits: dict[int, str] = field(default_factory=dict)
    """Of models on the hub, by the same index."""

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._id = new_batch_id(self.started, after=next(reversed(batch_ids(self.store)), None))
        self._events = Events(self.zoo.on_event, self.say)

    @property
    def mover(self) -> str:
        """Who moves an alias."""
        return f"{this_user()}, batch {self._id}"

    def tell(self, name: Name, *, model: str | None = None) -> None:
        """Tell the hook of an event, with the models that have ended."""
        self._events.tell(name, self._clean(self._as_it_stands(all_models=False)), model=model)

    def close(self) -> None:
        self._events.close()

    def record(self) -> Batch:
        """Write the batch's manifest, with local paths reduced to names, and the page for all batches."""
        stored = self._clean(self._as_it_stands())
        save_batch(self.store, stored)
        page = render_index([*past_batches(self.store, before=stored.id), stored])
        self.store.put_bytes(INDEX_NAME, page.encode())
        return stored

    def _clean(self, batch: Batch) -> Batch:
        batch = without_credentials(batch)
        given = [text for model in self.zoo.models for text in (model.job.model, model.job.recipe)]
        return by_name(batch, given=(batch.destination, *given))

    def _as_it_stands(self, *, all_models: bool = True) -> Batch:
        elapsed = timedelta(seconds=time.monotonic() - self._began)  # the clock may go back meanwhile
        return Batch(
            id=self._id,
            zoo=self.zoo.name,
            zoo_digest=self.zoo.digest,
            destination=self.store.uri,
            started_at=self.started.isoformat(timespec="seconds"),
            finished_at=(self.started + elapsed).isoformat(timespec="seconds"),
            ffsplit_version=__version__,
            max_models_in_flight=self.zoo.max_models_in_flight,
            models=tuple(
                self.ended.get(index) or _interrupted(model)
                for index, model in enumerate(self.zoo.models)
                if all_models or index in self.ended
            ),
        )


def run_zoo(
    zoo: Zoo,
    *,
    address: str | None = None,
    runner: Literal["ray", "serial"] = "ray",
    workers: int | None = None,
    say: Say | None = None,
) -> Batch:
    """Compress every model of a zoo, and publish what passes its gates. Returns the batch as recorded.

    A batch that runs in this destination already is waited for. A model that fails is retried, and never
    stops the others. A batch that is interrupted, by SIGINT or SIGTERM, is recorded at once: models that have
    ended with their outcome, the others as interrupted. Raises ConfigError, before anything is run, if the
    cluster or the destination cannot be used.
    """
    if zoo.on_event is not None:
        zoo.on_event.check()
    store, say = open_store(zoo.destination), say or streams.note
    store.check_writable()
    with share_cluster(address, runner=runner) as cluster, own_turn(store, say):
        at, commits = at_commits(zoo, say)
        this = _Pass(zoo, store, say, datetime.now(timezone.utc), commits=commits)
        share = workers or max(1, cluster.num_cpus // zoo.max_models_in_flight)
        jobs = [
            model.job.model_copy(
                update={"address": cluster.address, "runner": runner, "workers": model.job.workers or share}
            )
            for model in at.models
        ]
        with begun():
            try:
                this.tell("started")
                with suppress(KeyboardInterrupt):  # _run_all has recorded the batch and ended its processes
                    asyncio.run(_run_all(this, jobs))
                batch = this.record()
                this.tell("finished")
                return batch
            finally:
                this.close()


async def _run_all(this: _Pass, jobs: list[JobConfig]) -> None:
    """Run every model, in the order of the file."""
    running = asyncio.Semaphore(this.zoo.max_models_in_flight)
    tasks = [asyncio.create_task(_run_model(this, index, job, running)) for index, job in enumerate(jobs)]
    try:
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        with suppress(FFSplitError):  # the final record retries it, and reports a failure
            await asyncio.to_thread(this.record)  # at once: the job may be killed soon
        raise
    finally:  # every process is ended before this returns
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_model(this: _Pass, index: int, job: JobConfig, running: asyncio.Semaphore) -> None:
    """Run one model, with retries. While it waits for its next attempt, it does not count as running."""
    model, wall_s = this.zoo.models[index], 0.0
    attempts = Attempts(job, retries=this.zoo.retries, backoff_s=this.zoo.backoff_s)
    while True:
        async with running:
            started = time.monotonic()
            try:
                ended = await run_process(
                    attempts.job,
                    lambda line: this.say(f"{model.name} | {line}"),
                    within_s=3600 * this.zoo.attempt_hours,
                )
            except OSError as error:  # out of processes, descriptors or disk: other models may still run
                ended = Ended(FAILED, f"its process could not be run: {error}", None)
            wall_s += time.monotonic() - started
        another = attempts.follow(ended)
        if another is None:
            break
        this.say(f"{model.name} | {another.told}")
        await asyncio.sleep(another.wait_s)
    recorded = _describe(this, index, attempts, wall_s=round(wall_s, 3))
    if recorded.state in ("published", "committed already"):
        recorded = await asyncio.to_thread(_promoted, this, model, recorded)
    this.ended[index] = recorded
    why = [recorded.error] if recorded.error else _unmet(recorded.result.gates if recorded.result else ())
    this.say(f"{model.name} | {recorded.state}{': ' if why else ''}{'; '.join(why)}")
    if (promotion := recorded.promotion) is not None:
        this.say(f"{model.name} | {'; '.join([describe_promotion(promotion), *_unmet(promotion.gates)])}")
    if recorded.state in ("published", "refused", "failed"):
        this.tell(recorded.state, model=model.name)


def _unmet(results: Sequence[GateResult]) -> list[str]:
    """Gates that are not met, one text each."""
    return [describe_result(result) for result in results if not result.met]


def _promoted(this: _Pass, model: ZooModel, recorded: BatchModel) -> BatchModel:
    """The record of a published model, with what became of its promotion."""
    alias, result = this.zoo.promote, recorded.result
    if alias is None or result is None:
        return recorded
    promotion = promote_result(model, result.run_key, alias=alias, by=this.mover)
    return recorded.model_copy(update={"promotion": promotion})


def _describe(this: _Pass, index: int, attempts: Attempts, *, wall_s: float) -> BatchModel:
    model, ended = this.zoo.models[index], attempts.outcome
    assert ended is not None, "there was an attempt"
    result = ended.result if ended.exit_code in (DONE, REFUSED) else None
    commit = this.commits.get(index)
    return BatchModel(
        name=model.name,
        model=model.job.model,
        recipe=model.job.recipe,
        state="failed" if result is None else result.state,
        result=result,
        error=ended.last_words if result is None else None,
        num_attempts=attempts.number,
        wall_s=wall_s,
        less_memory=attempts.less_memory,
        revision=None if commit is None else model.job.revision or "main",
        commit=commit,
        cost=None if result is None else cost_of(result, this.zoo.prices),
    )


def _interrupted(model: ZooModel) -> BatchModel:
    return BatchModel(
        name=model.name,
        model=model.job.model,
        recipe=model.job.recipe,
        state="interrupted",
        result=None,
        error="the batch was interrupted before this model finished; the next batch resumes it",
        num_attempts=0,
        wall_s=0.0,
    )
