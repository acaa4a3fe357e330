"""An attempt at a run that is not committed yet: computed, described, judged and published."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from ffsplit import logs
from ffsplit.directories import full_disk_explained, temporary_folder
from ffsplit.distributed import make_runner
from ffsplit.distributed.runner import Runner
from ffsplit.errors import begun
from ffsplit.measurement.gates import judge, refusal
from ffsplit.models.folder import left_out_in_one_line
from ffsplit.progress import Progress, StageLog
from ffsplit.run.computation import compute_model, compute_statistics
from ffsplit.run.documents import write_documents
from ffsplit.run.execution import Execution
from ffsplit.run.needs import in_one_line
from ffsplit.run.placement import place
from ffsplit.run.prepare import PreparedRun
from ffsplit.store.commits import Kind
from ffsplit.store.digests import file_entries
from ffsplit.store.entries import StoreGuarantees
from ffsplit.store.locate import STATISTICS_PATH, locate, read_manifest
from ffsplit.store.manifest import MANIFEST_NAME, REPORT_NAME, SIGNATURE_NAME, Manifest
from ffsplit.store.publish import Upload, new_attempt_id
from ffsplit.store.scratch import Scratch
from ffsplit.store.signing import sign_manifest
from ffsplit.store.store import Store


class Ending(NamedTuple):
    """How an attempt ended, and the manifest that it wrote, or of the attempt that was committed first."""

    state: Literal["published", "refused"]
    manifest: Manifest


@dataclass(frozen=True)
class Attempt:
    """A run, and where its result goes: under `key` in a store that gives `guarantees`."""

    run: PreparedRun
    kind: Kind
    key: str
    scratch: Scratch
    store: Store
    guarantees: StoreGuarantees
    sign_key: Path | None

    @property
    def refused_report(self) -> str:
        """Where in the store the report of a result lies that its gates refused."""
        return self.scratch.key(f"refused/{REPORT_NAME}")

    @contextmanager
    def connected(self) -> Iterator[Runner]:
        """The run's runner. Raises ConfigError, before anything is written, for one that cannot be used."""
        workers = self.run.flight.machine.num_workers
        with logs.fields(run=self.key), make_runner(self.run.config, workers_here=workers) as runner:
            yield runner

    def carry_out(self, runner: Runner, shown: Progress) -> Ending:
        """Compute the run, and publish it unless its gates refuse it.

        Raises ConfigError for hosts that do not fit together. Then nothing is left behind; what goes wrong
        later is no mistake in the configuration, whoever raises it.
        """
        config, log = self.run.config, StageLog(shown)
        with full_disk_explained(), temporary_folder() as folder:
            asked = config.workers if config.runner == "ray" else None
            shown.note(in_one_line(self.run.flight, asked=asked))
            shown.note(
                f"run {self.key}: {config.model} with recipe {self.run.recipe.name}, {self.run.budget}"
            )
            if self.kind == "model" and (left_out := left_out_in_one_line(self.run.left_out)):
                shown.note(left_out)
            if unread := self.run.checkpoint.unread_blocks:
                shown.note(
                    f"warning: config.json states fewer blocks: {', '.join(unread)} stay as they are, unread"
                )
            execution = place(self.run, self.scratch, runner, log, shown=shown)
            with begun():
                return self._compute_and_publish(execution, folder)

    def _compute_and_publish(self, execution: Execution, folder: Path) -> Ending:
        attempt = new_attempt_id()
        staging = folder / attempt
        (staging / STATISTICS_PATH).parent.mkdir(parents=True)
        compute = compute_model if self.kind == "model" else compute_statistics
        run, computed = compute(execution, staging)
        computed = replace(computed, guarantees=self.guarantees)
        if computed.measurements is not None:
            computed = replace(computed, gates=judge(run.gates, computed.measurements))
        write = partial(
            write_documents,
            run,
            computed,
            staging,
            run_key=self.key,
            attempt=attempt,
            stages=execution.log.stages,
        )
        if refusal(computed.gates) is not None:
            manifest = write(files=file_entries(staging))
            self.store.put_file(self.refused_report, staging / REPORT_NAME)
            return Ending("refused", manifest)
        logs.log("publishing", attempt=attempt)
        with Upload(self.store, run_key=self.key, attempt=attempt) as upload:
            manifest = write(files=upload.add(staging))
            if self.sign_key is not None:
                data = (staging / MANIFEST_NAME).read_bytes()
                (staging / SIGNATURE_NAME).write_bytes(sign_manifest(data, key=self.sign_key))
            standing = upload.commit(staging, kind=self.kind, move_latest=self.kind == "model")
        if standing.attempt != attempt:  # another of the same key was first
            manifest = read_manifest(locate(f"{self.store.uri}/{self.key}"))
        return Ending("published", manifest)
