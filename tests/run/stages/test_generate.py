"""Text that the model writes itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import ffsplit
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_tokenizer, load_whole_model
from ffsplit.run import workload
from ffsplit.run.job import prepare
from ffsplit.run.stages import generate
from ffsplit.run.stages.generate import random_openings, sample_rows, turn_of_user, written_rows
from tests.small_jobs import SmallJob, committed_digests

Checkpoints = Callable[..., Path]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}ask {{ m.content }}{% else %} say {{ m.content }} end "
    "{% endif %}{% endfor %}"
)


@pytest.fixture
def llama_job(checkpoint_of: Checkpoints, tmp_path: Path) -> SmallJob:
    return SmallJob(tmp_path, checkpoint_of("llama", head="ForCausalLM"))


def write(model: Any, tokenizer: Any, num_rows: int, num_tokens: int, *, seed: int = 1) -> torch.Tensor:
    return written_rows(model, tokenizer, num_rows, num_tokens=num_tokens, pad_id=0, seed=seed)


def test_rows_follow_the_models_own_distribution(checkpoint_of: Checkpoints) -> None:
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    model = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=torch.float32)
    start = torch.full((4000, 1), 7)
    rows = sample_rows(model, start, num_tokens=2, bos_id=None, pad_id=0, seed=1)
    with torch.no_grad():
        expected = model(start[:1]).logits[0, -1].softmax(-1)
    found = torch.bincount(rows[:, 1], minlength=len(expected)) / len(rows)
    assert (found - expected).abs().sum() < 2.5 * (expected.sqrt().sum() / len(rows) ** 0.5)
    assert len(torch.unique(rows[:, 1])) > len(expected) // 4


def test_the_same_seed_gives_the_same_rows(checkpoint_of: Checkpoints) -> None:
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    model = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=torch.float32)
    own, tokenizer = model.generation_config, load_tokenizer(checkpoint)
    first, again, other = (write(model, tokenizer, 4, 6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (4, 6) and model.generation_config is own


def test_rows_begin_with_many_tokens_none_of_them_special(checkpoint_of: Checkpoints) -> None:
    tokenizer = load_tokenizer(open_checkpoint(checkpoint_of("llama", head="ForCausalLM")))
    first = random_openings(tokenizer, 64, seed=3).flatten().tolist()
    assert len(set(first)) > 20
    assert not set(first) & set(tokenizer.all_special_ids)


def test_every_second_row_of_a_chat_model_begins_as_the_turn_of_a_user(checkpoint_of: Checkpoints) -> None:
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    model = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    assert turn_of_user(tokenizer) == ""
    tokenizer.chat_template = TEMPLATE
    assert turn_of_user(tokenizer) == " end ask "
    turn = tokenizer("end ask", add_special_tokens=False)["input_ids"]
    rows = write(model, tokenizer, 5, 8 + len(turn))
    assert rows[1::2, : len(turn)].tolist() == [turn] * 2
    assert torch.equal(rows[::2, :1], random_openings(tokenizer, 3, seed=1))
    assert len({tuple(row) for row in rows.tolist()}) == 5
    assert write(model, tokenizer, 2, 1)[1].tolist() == turn[:1]
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    assert turn_of_user(tokenizer) == ""


def test_the_start_token_is_read_and_left_out(checkpoint_of: Checkpoints) -> None:
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    model = load_whole_model(checkpoint.directory, checkpoint.class_name, dtype=torch.float32)
    options: dict[str, Any] = {"num_tokens": 4, "pad_id": 0, "seed": 1}
    begun = torch.full((64, 1), 9)
    with_start = sample_rows(model, begun, bos_id=5, **options)
    assert with_start.shape == (64, 4) and bool((with_start[:, 0] == 9).all())
    assert not torch.equal(with_start, sample_rows(model, begun, bos_id=None, **options))


def test_a_run_needs_no_data(llama_job: SmallJob, tmp_path: Path) -> None:
    manifest = ffsplit.compress(llama_job.config(tmp_path / "out", calibration=("self:640",), samples=None))
    assert manifest.calibration.own_rows == manifest.calibration.num_rows == 40
    assert manifest.calibration.held_out_rows == 8
    card = next((tmp_path / "out").rglob("README.md")).read_text("utf-8")
    assert "no data was used" in card


def test_given_and_own_rows_are_mixed(llama_job: SmallJob, tmp_path: Path) -> None:
    sources = (f"{llama_job.text}:0.5", "self:")
    manifest = ffsplit.compress(llama_job.config(tmp_path / "out", calibration=sources))
    assert manifest.calibration.own_rows * 2 == manifest.calibration.num_rows
    assert manifest.calibration.sources == ("text.txt:0.5", "self:")
    alone = ffsplit.compress(llama_job.config(tmp_path / "alone"))
    assert alone.run_key != manifest.run_key and alone.calibration.own_rows == 0


def test_a_recipe_asks_for_the_models_own_text(llama_job: SmallJob, tmp_path: Path) -> None:
    recipe = llama_job.recipe().replace(".yaml", "-own.yaml")
    text = Path(llama_job.recipe()).read_text("utf-8").replace("held_out: 8", "held_out: 8, own_share: 0.5")
    Path(recipe).write_text(text, "utf-8")
    with_own = prepare(llama_job.config(tmp_path / "out", recipe=recipe))
    assert with_own.own.calibration == len(with_own.sample.calibration)
    whole = prepare(llama_job.config(tmp_path / "out", recipe=recipe, calibration=(f"{llama_job.text}:1",)))
    assert whole.own.total == 0
    streamed = prepare(llama_job.config(tmp_path / "out", recipe=recipe, block_by_block=True))
    assert streamed.own.total == 0


@pytest.mark.parametrize(("share", "num_read"), [("", 4), (":0.5", 16)])
def test_a_number_of_tokens_leaves_the_read_rows_their_room(
    llama_job: SmallJob, tmp_path: Path, share: str, num_read: int
) -> None:
    """The recipe reads 64 tokens, and the model writes 16 rows of 16 beside them, or as many as are read."""
    recipe = Path(llama_job.recipe().replace(".yaml", "-limited.yaml"))
    text = Path(llama_job.recipe()).read_text("utf-8").replace("held_out: 8", "held_out: 1, max_tokens: 64")
    recipe.write_text(text, "utf-8")
    sources = (f"{llama_job.text}{share}", "self:256")
    run = prepare(llama_job.config(tmp_path / "out", recipe=str(recipe), samples=None, calibration=sources))
    assert run.own.calibration == 16 and len(run.text.calibration) == num_read


def test_an_encoder_cannot_write(small_job: SmallJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="self: needs a causal language model"):
        prepare(small_job.config(tmp_path / "out", calibration=("self:",)))


def test_block_by_block_cannot_write(llama_job: SmallJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole model in memory"):
        prepare(llama_job.config(tmp_path / "out", calibration=("self:",), block_by_block=True))


def test_an_unfinished_run_writes_nothing_twice(
    llama_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "CPU_ROWS", 8)
    config = llama_job.config(tmp_path / "out", calibration=("self:640",), samples=None)
    written: list[int] = []

    def fail_at_the_last(model: Any, tokenizer: Any, num_rows: int, **options: Any) -> torch.Tensor:
        if len(written) == 3:
            raise RuntimeError("killed")
        return counted(model, tokenizer, num_rows, **options)

    def counted(model: Any, tokenizer: Any, num_rows: int, **options: Any) -> torch.Tensor:
        written.append(num_rows)
        return written_rows(model, tokenizer, num_rows, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "written_rows", fail_at_the_last)
        with pytest.raises(ffsplit.FFSplitError, match=r"write text: .*killed.* FILE:1"):
            ffsplit.compress(config)
    written.clear()
    monkeypatch.setattr(generate, "written_rows", counted)
    resumed = ffsplit.compress(config)
    assert written == [8, 8, 8]  # of the six shards
    unbroken = ffsplit.compress(llama_job.config(tmp_path / "other", calibration=("self:640",), samples=None))
    assert resumed.run_key == unbroken.run_key
    assert committed_digests(tmp_path / "out") == committed_digests(tmp_path / "other")


def test_a_shard_is_a_parquet_file_with_its_lineage(llama_job: SmallJob, tmp_path: Path) -> None:
    from ffsplit.run.stages.generate import read_rows, write_rows

    path = tmp_path / "own.parquet"
    write_rows(path, ["one", "two\nlines"], lineage={"model": "abc", "shard": "0"})
    assert read_rows(path) == ["one", "two\nlines"]
    metadata = pyarrow.parquet.read_schema(path).metadata
    assert b'"model": "abc"' in metadata[b"ffsplit.lineage"]
    first = path.read_bytes()
    os.remove(path)
    write_rows(path, ["one", "two\nlines"], lineage={"model": "abc", "shard": "0"})
    assert path.read_bytes() == first
