"""How long a row is, by what reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ffsplit.calibration.model_inputs import tokenize_rows
from ffsplit.calibration.sampling import CalibrationSettings
from ffsplit.models.load import load_tokenizer
from ffsplit.run.job import prepare
from tests.small_jobs import SmallJob
from tests.tiny_models import MAX_POSITIONS


@pytest.mark.parametrize(
    ("given", "windows", "max_positions", "length", "rows"),
    [
        ({}, False, 512, 128, 128),
        ({}, False, 64, 64, 256),
        ({}, False, None, 128, 128),
        ({}, True, 4096, 512, 32),
        ({}, True, 160, 160, 102),
        ({}, True, None, 512, 32),
        ({"max_length": 64}, True, 4096, 64, 256),
        ({"max_length": 20000}, True, 32768, 20000, 1),
        ({"shard_size": 8}, True, 4096, 512, 8),
    ],
)
def test_rows_are_as_long_as_the_model_asks_for(
    given: dict[str, int], windows: bool, max_positions: int | None, length: int, rows: int
) -> None:
    settings = CalibrationSettings(**given).settled(windows=windows, max_positions=max_positions)
    assert (settings.row_length, settings.rows_per_shard) == (length, rows)
    assert settings.settled(windows=windows, max_positions=max_positions) == settings


def test_batches_are_larger_on_gpus_unless_a_recipe_says_how_large() -> None:
    """Where outputs are compared they are not: a large vocabulary's logits would take the memory."""

    def settled(on_gpu: bool, **given: int) -> tuple[int, int]:
        settings = CalibrationSettings(**given).settled(windows=True, max_positions=None, on_gpu=on_gpu)
        return settings.tokens_per_batch, settings.compared_tokens

    assert settled(False) == (4096, 4096)
    assert settled(True) == (16384, 4096)
    assert settled(True, batch_tokens=1024) == settled(False, batch_tokens=1024) == (1024, 1024)


def test_a_causal_model_reads_windows_as_long_as_its_positions(
    small_job: SmallJob, checkpoint_of: Any, tmp_path: Path
) -> None:
    small_job.model = checkpoint_of("llama", head="ForCausalLM")
    small_job.text.write_text("\n".join([small_job.text.read_text("utf-8")] * 8), "utf-8")
    default, short = (prepare(small_job.config(tmp_path / "out", max_length=length)) for length in (None, 16))
    assert default.recipe.calibration.max_length == MAX_POSITIONS
    assert short.recipe.calibration.max_length == 16
    assert default.keys.run != short.keys.run
    rows = tokenize_rows(
        load_tokenizer(default.checkpoint), default.text.calibration, max_length=MAX_POSITIONS
    )
    assert sum(map(len, rows)) > 0.9 * MAX_POSITIONS * len(rows)
    assert len(default.text.calibration) < len(short.text.calibration)


def test_held_out_rows_are_as_few_as_their_tokens_ask_for(small_job: SmallJob, tmp_path: Path) -> None:
    config = small_job.config(tmp_path / "out")
    whole = prepare(config)
    path = tmp_path / "few.yaml"
    given = Path(small_job.recipe()).read_text("utf-8")
    path.write_text(given.replace("held_out: 8", "held_out: 8, held_out_tokens: 30"), "utf-8")
    few = prepare(config.model_copy(update={"recipe": str(path)}))
    assert 1 <= len(few.text.held_out) < len(whole.text.held_out)
    assert few.text.held_out == whole.text.held_out[: len(few.text.held_out)]
    assert few.text.calibration == whole.text.calibration
