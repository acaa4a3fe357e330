"""What a look at a model promises."""

from __future__ import annotations

from ffsplit.forecasts import BUDGETS, inspect
from tests.small_jobs import PRUNE, SmallJob


def test_budgets_that_a_recipe_cannot_meet_are_left_out(small_job: SmallJob) -> None:
    """One that only rounds weights keeps them all."""
    found = {
        step: [
            preview.keep
            for preview in inspect(str(small_job.model), recipe=small_job.recipe(step=step)).budgets
        ]
        for step in (PRUNE, "{kind: quantize}")
    }
    assert found == {PRUNE: list(BUDGETS), "{kind: quantize}": []}
