"""What a run says before it begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ffsplit.run.checks import slow_on_a_gpu
from ffsplit.run.job import prepare
from tests.small_jobs import SmallJob


@pytest.mark.parametrize(("recipe", "is_slow"), [("paper", True), ("whitened-svd", True), ("refit", False)])
def test_low_rank_parts_on_a_gpu(recipe: str, is_slow: bool, small_job: SmallJob, tmp_path: Path) -> None:
    run = prepare(small_job.config(tmp_path / "out", recipe=recipe))
    assert slow_on_a_gpu(run) is None
    line = slow_on_a_gpu(replace(run, profile=run.profile.model_copy(update={"device": "cuda"})))
    assert (line is not None) == is_slow
    if line is not None:
        assert line.startswith(
            f"recipe {recipe} on a GPU: its low-rank parts are slower than the original below"
        )
