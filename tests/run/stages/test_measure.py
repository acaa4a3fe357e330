"""What a run measures of both models, and what of it can be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit.distributed.runner import SerialRunner
from tests.run.stages.blank_rows import with_blank_rows
from tests.small_jobs import SmallJob


@pytest.mark.slow
def test_peak_memory_is_that_of_the_largest_shape_of_both_models(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "peak.yaml"
    recipe.write_text(Path(small_job.recipe()).read_text().replace("peak_memory: false", "peak_memory: true"))
    measured = ffsplit.compress(small_job.config(tmp_path / "out", recipe=str(recipe))).measurements
    assert measured is not None
    original, compressed = measured.original_peak_memory_bytes, measured.compressed_peak_memory_bytes
    assert original is not None and compressed is not None
    assert original > measured.original_size.file_bytes and compressed > measured.compressed_size.file_bytes


@pytest.mark.parametrize("block_by_block", [False, True])
def test_held_out_rows_without_a_token_leave_nothing_to_compare(
    block_by_block: bool, small_job: SmallJob, tmp_path: Path
) -> None:
    with_blank_rows(small_job, first=0, last=6)
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", block_by_block=block_by_block))
    assert manifest.calibration.held_out_rows == 6
    measured = manifest.measurements
    assert measured is not None and (measured.fidelity, measured.blocks) == ({}, ())
    assert bool(measured.skipped) == block_by_block


def test_a_measurement_has_its_host_to_itself(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, dict[str, Any]] = {}
    run_alone = SerialRunner.run_alone

    def watched(self: SerialRunner, stage: str, function: Any, item: Any, **options: Any) -> Any:
        asked[stage] = options
        return run_alone(self, stage, function, item, **options)

    monkeypatch.setattr(SerialRunner, "run_alone", watched)
    ffsplit.compress(small_job.config(tmp_path / "out"))
    assert asked["measure"]["reserved"] is True
