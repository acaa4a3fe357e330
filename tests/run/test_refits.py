"""Runs that fit their layers again in the compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit.errors import FFSplitError
from ffsplit.run.stages import measure
from tests.small_jobs import LOW_RANK, SmallJob, digests

REFITS = "refits: [{num_steps: 40}, {num_steps: 40, learning_rate: 0.004}]"


def refitting(job: SmallJob, out: Path, more: str = REFITS) -> ffsplit.JobConfig:
    recipe = job.recipe(step="{kind: prune}, {kind: distill, num_steps: 80}", more=more)
    return job.config(out, recipe=recipe, keep=0.3)


def test_layers_are_fitted_again_in_the_compressed_model(small_job: SmallJob, tmp_path: Path) -> None:
    once = ffsplit.compress(refitting(small_job, tmp_path / "once", more=""))
    again = ffsplit.compress(refitting(small_job, tmp_path / "again"))
    assert again.plain
    assert once.measurements and again.measurements
    assert again.measurements.compressed_size == once.measurements.compressed_size
    fidelity = [each.measurements.fidelity["token_cosine"] for each in (once, again) if each.measurements]
    assert fidelity[1] > fidelity[0]


def test_a_stopped_run_fits_nothing_twice(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise FFSplitError("measured nothing")

    ffsplit.compress(refitting(small_job, tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure_job", fail)
        with pytest.raises(FFSplitError, match="measured nothing"):
            ffsplit.compress(refitting(small_job, tmp_path / "out"))
    resumed = ffsplit.compress(refitting(small_job, tmp_path / "out"))
    assert [(stage.name, stage.num_items, stage.num_reused) for stage in resumed.stages] == [
        ("calibrate", 5, 5),
        ("compress", 3, 3),
        ("sample", 5, 5),
        ("refit", 3, 3),
        ("sample", 5, 5),
        ("refit", 3, 3),
        ("measure", 1, 0),
    ]
    files = ("*.safetensors", "stats/*.parquet", "config.json")
    assert digests(tmp_path / "out", *files) == digests(tmp_path / "undisturbed", *files)


def test_parts_of_two_kinds_are_not_fitted_again(small_job: SmallJob, tmp_path: Path) -> None:
    recipe = small_job.recipe(heavy_share=0.5, step=LOW_RANK, more="refits: [{num_steps: 3}]")
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe))
    assert [stage.name for stage in manifest.stages] == ["calibrate", "compress", "measure"]
