"""A classifier's logits do not depend on how its rows are padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ffsplit
from ffsplit.calibration.model_inputs import padded
from ffsplit.measurement.latency import batches_allowed
from ffsplit.models.load import row_logits
from tests.small_jobs import SmallJob
from tests.tiny_families import make_model

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pad_id", [None, 0, 17])
def test_rows_in_a_batch_are_as_they_are_alone(family: str, pad_id: int | None) -> None:
    model = make_model(family, "ForSequenceClassification")
    model.config.pad_token_id = pad_id
    ids, mask = padded(ROWS, pad_id=pad_id or 0)
    with torch.no_grad():
        together = row_logits(model, {"input_ids": ids, "attention_mask": mask})
        alone = [
            row_logits(model, {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))})
            for row in ROWS
        ]
    torch.testing.assert_close(together.float(), torch.cat(alone).float())


def test_a_model_is_timed_in_batches_and_left_as_it_was() -> None:
    models = [make_model("gpt2", "ForSequenceClassification") for _ in range(2)]
    models[0].config.pad_token_id, models[1].config.pad_token_id = None, 3
    with batches_allowed(*models), torch.no_grad():
        assert models[0](input_ids=torch.tensor([[5, 6], [7, 8]])).logits.shape[0] == 2
        assert models[1].config.pad_token_id == 3
    assert [model.config.pad_token_id for model in models] == [None, 3]


@pytest.mark.parametrize("pad_id", [None, 7])
def test_a_causal_classifier_is_searched_healed_and_scored(
    pad_id: int | None, small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    folder = checkpoint_of("llama", head="ForSequenceClassification", pad_token_id=pad_id)
    labels = tmp_path / "labels.tsv"
    labels.write_text("at home\t0\nmany people of the town\t1\n")
    recipe = small_job.recipe(
        step="{kind: prune}", allocation="search", more="healing: {epochs: 1, batch_rows: 8, evaluations: 1}"
    )
    config = small_job.config(
        tmp_path / "out", model=str(folder), recipe=recipe, eval=(f"classification:{labels}",)
    )
    manifest = ffsplit.compress(config)
    assert manifest.measurements is not None and manifest.allocation is not None
    assert {score.metric for score in manifest.measurements.tasks} == {"accuracy", "f1"}
    assert manifest.measurements.fidelity["logit_error"] > 0
