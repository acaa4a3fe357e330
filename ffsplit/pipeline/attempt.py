"""An attempt at a run that is not committed yet: computed, described, judged and published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ffsplit import logs
from ffsplit.artifacts.commits import Kind
from ffsplit.artifacts.digests import file_entries
from ffsplit.artifacts.entries import StoreGuarantees
from ffsplit.artifacts.manifest import MANIFEST_NAME, REPORT_NAME, SIGNATURE_NAME, Manifest
from ffsplit.artifacts.publish import Upload, new_attempt_id
from ffsplit.artifacts.scratch import Scratch
from ffsplit.artifacts.signing import sign_manifest
from ffsplit.artifacts.statistics import STATISTICS_PATH
from ffsplit.artifacts.stores import Store
from ffsplit.distributed import make_runner
from ffsplit.gates import judge, refusal
from ffsplit.models.folder import left_out_in_one_line
from ffsplit.pipeline.computation import compute_model, compute_statistics
from ffsplit.pipeline.documents import write_documents
from ffsplit.pipeline.placement import place
from ffsplit.pipeline.prepare import PreparedRun
from ffsplit.preflight.words import in_one_line
from ffsplit.progress import Progress, StageLog
from ffsplit.temporary import full_disk_explained, temporary_folder


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

    def carry_out(self, shown: Progress) -> Manifest | None:
        """Compute the run and publish it. Returns its manifest instead where its gates refuse it."""
        run, config, log = self.run, self.run.config, StageLog(shown)
        with (
            logs.fields(run=self.key),
            full_disk_explained(),
            make_runner(config, workers_here=run.flight.machine.num_workers) as runner,
            temporary_folder() as folder,
        ):
            shown.note(in_one_line(run.flight, asked=config.workers if config.runner == "ray" else None))
            shown.note(f"run {self.key}: {config.model} with recipe {run.recipe.name}, {run.budget}")
            if self.kind == "model" and (left_out := left_out_in_one_line(run.left_out)):
                shown.note(left_out)
            attempt = new_attempt_id()
            staging = folder / attempt
            (staging / STATISTICS_PATH).parent.mkdir(parents=True)
            compute = compute_model if self.kind == "model" else compute_statistics
            run, outcome = compute(place(run, self.scratch, runner, log, shown=shown), staging)
            outcome = replace(outcome, guarantees=self.guarantees)
            if outcome.measurements is not None:
                outcome = replace(outcome, gates=judge(run.gates, outcome.measurements))
            write = partial(
                write_documents, run, outcome, staging, run_key=self.key, attempt=attempt, stages=log.stages
            )
            if refusal(outcome.gates) is not None:
                manifest = write(files=file_entries(staging))
                self.store.put_file(self.refused_report, staging / REPORT_NAME)
                return manifest
            logs.log("publishing", attempt=attempt)
            with Upload(self.store, run_key=self.key, attempt=attempt) as upload:
                write(files=upload.add(staging))
                if self.sign_key is not None:
                    data = (staging / MANIFEST_NAME).read_bytes()
                    (staging / SIGNATURE_NAME).write_bytes(sign_manifest(data, key=self.sign_key))
                upload.commit(staging, kind=self.kind, move_latest=self.kind == "model")
        return None
