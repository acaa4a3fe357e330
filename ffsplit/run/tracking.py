"""Log a finished run to an MLflow tracking server: parameters, metrics, report and manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from ffsplit.directories import temporary_folder
from ffsplit.errors import ConfigError, RunError, explained
from ffsplit.store.entries import MANIFEST_NAME
from ffsplit.store.manifest import REPORT_NAME, Manifest
from ffsplit.store.store import Store

EXPERIMENT = "ffsplit"
"""Unless MLFLOW_EXPERIMENT_NAME names another."""
RUN_TAG, ATTEMPT_TAG, STATE_TAG = "ffsplit.run_key", "ffsplit.attempt", "ffsplit.state"
LONGEST_PARAM = 500

_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


class Tracker:
    """A tracking server that answers. Raises ConfigError if it does not, before any work."""

    def __init__(self, uri: str) -> None:
        try:
            import mlflow
        except ImportError:
            raise ConfigError("--mlflow needs mlflow-skinny: pip install 'ffsplit[mlflow]'") from None
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # else minutes without a server
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        name = mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or EXPERIMENT
        with explained(f"--mlflow {uri}", advice="check the URI, and MLFLOW_TRACKING_TOKEN if it needs one"):
            found = self._client.get_experiment_by_name(name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(name)

    def log(self, manifest: Manifest, *, state: str, store: Store, report: str) -> str | None:
        """Log a run, and return the id that MLflow gave it; None if this attempt is logged already.

        Raises RunError if the server fails.
        """
        with explained("MLflow", kind=RunError), temporary_folder() as folder:
            same = f"tags.`{ATTEMPT_TAG}` = '{manifest.attempt}'"
            if self._client.search_runs([self._experiment], filter_string=same, max_results=1):
                return None
            recipe = manifest.recipe.get("name", "")
            run = self._client.create_run(
                self._experiment,
                run_name=f"{manifest.model.id}, {recipe}",
                tags={
                    RUN_TAG: manifest.run_key,
                    ATTEMPT_TAG: manifest.attempt,
                    STATE_TAG: state,
                    "ffsplit.uri": manifest.uri or "",
                    "ffsplit.version": manifest.ffsplit_version,
                },
            ).info.run_id
            for name, value in _parameters(manifest):
                self._client.log_param(run, name, str(value)[:LONGEST_PARAM])
            for name, figure in _metrics(manifest):
                self._client.log_metric(run, _NOT_IN_NAMES.sub("_", name), figure)
            for name, data in (
                (MANIFEST_NAME, manifest.to_json().encode()),
                (REPORT_NAME, store.get_bytes(report)),
            ):
                (folder / name).write_bytes(data)
                self._client.log_artifact(run, str(folder / name))
            self._client.set_terminated(run, "FAILED" if state == "refused" else "FINISHED")
            return str(run)


def _parameters(manifest: Manifest) -> Iterator[tuple[str, object]]:
    yield "model", manifest.model.id
    yield "revision", manifest.model.revision or ""
    yield "recipe", manifest.recipe.get("name", "")
    yield "budget", "" if manifest.budget is None else manifest.budget
    yield "seed", manifest.seed
    yield "device", manifest.compute.device
    yield "dtype", manifest.compute.dtype
    yield "calibration", ", ".join(manifest.calibration.sources)
    yield "calibration_rows", manifest.calibration.num_rows
    yield "gates", "; ".join(result.gate for result in manifest.gates)


def _metrics(manifest: Manifest) -> Iterator[tuple[str, float]]:
    if manifest.keep is not None:
        yield "keep", manifest.keep
    for stage in manifest.stages:
        yield f"seconds/{stage.name}", stage.wall_s
    measured = manifest.measurements
    if measured is None:
        return
    for name, size in (("original", measured.original_size), ("compressed", measured.compressed_size)):
        yield f"parameters/{name}", size.num_parameters
        yield f"weight_bytes/{name}", size.file_bytes
    yield from ((f"fidelity/{name}", value) for name, value in measured.fidelity.items())
    for each in measured.latency:
        yield f"speedup/{each.batch_size}x{each.num_tokens}", each.speedup
    for task in measured.tasks:
        yield f"task/{task.name} {task.metric}/original", task.original
        yield f"task/{task.name} {task.metric}/compressed", task.compressed
