"""What healing sees of the integers that a recipe ends with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import ffsplit
from ffsplit.compressors import QuantizeCompressor
from ffsplit.compressors.base import LayerContext
from ffsplit.errors import FFSplitError
from ffsplit.ffn.quantization import fake_quantize
from ffsplit.ffn.shapes import LayerLayout
from ffsplit.healing.loop import settle
from ffsplit.healing.team import Alone
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.run.job import prepare
from ffsplit.run.stages import heal as stage
from ffsplit.run.stages.heal import HealJob, _round, heal_job
from ffsplit.runtime.attention_int8 import attention_linears
from ffsplit.runtime.ffn_tensors import load_ffn
from tests.small_jobs import SmallJob
from tests.tiny_families import save_checkpoint


def rounded(
    folder: Path, quantization: QuantizeCompressor, *, linears: str = "kept"
) -> tuple[Any, list[Any]]:
    """A model that computes with the integers it ends with, and the linear layers that have them."""
    checkpoint = open_checkpoint(folder)
    student = load_whole_model(folder, checkpoint.class_name, dtype=torch.float32)
    job = SimpleNamespace(quantization=quantization, linears=linears)
    return student, _round(student, checkpoint, cast(HealJob, job))


HEALING = "healing: {epochs: 1, batch_rows: 8, evaluations: 1, checkpoint_minutes: 0}"


class Seen(FFSplitError):
    """What healing was given is known; there is no need to do it."""


def test_healing_sees_no_held_out_row(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns from the calibration's rows, and stops by rows that nothing else looks at."""
    jobs: list[HealJob] = []

    def seen(job: HealJob) -> None:
        jobs.append(job)
        raise Seen

    monkeypatch.setattr(stage, "heal_job", seen)
    config = small_job.config(tmp_path / "out", recipe=small_job.recipe(more=HEALING))
    with pytest.raises(Seen):
        ffsplit.compress(config)
    (job,) = jobs
    held_out = set(prepare(config).text.held_out)
    assert held_out and job.rows and job.validation
    assert not held_out & {*job.rows, *job.validation}
    assert not set(job.rows) & set(job.validation)


@pytest.mark.parametrize(
    "quantization",
    [QuantizeCompressor(), QuantizeCompressor(num_bits=4, group_size=8)],
    ids=["int8", "int4 in groups"],
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "modernbert"])
def test_it_computes_with_the_weights_that_are_published(
    family: str, quantization: QuantizeCompressor, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path, family)
    student, linears = rounded(folder, quantization)
    checkpoint = open_checkpoint(folder)
    base = getattr(student, student.base_model_prefix, student)
    for ffn in checkpoint.ffns:
        dense = load_ffn(checkpoint, ffn.index, activation=torch.relu, device=torch.device("cpu"))
        layout = quantization.plan(
            LayerLayout.dense(ffn.shape), shape=ffn.shape, budget=ffn.shape.num_elements
        )
        assert layout is not None
        made = quantization.compress(dense, layout=layout, context=LayerContext(dense, inputs=())).heavy
        assert made is not None
        for place, linear in ((ffn.up, made.up), (ffn.gate, made.gate), (ffn.down, made.down)):
            if place is None or linear is None:
                continue
            path = place.name.removeprefix(checkpoint.prefix).removesuffix(".weight")
            seen = base.get_submodule(path).weight
            seen = seen.T if place.transposed else seen
            assert torch.equal(seen if place.half is None else seen.chunk(2)[place.half], linear.weight)
    settle(linears)
    assert all(type(linear).__name__ in ("Linear", "Conv1D") for linear in linears)


def test_it_rounds_attention_where_the_recipe_ends_so(checkpoint_of: Any) -> None:
    folder = checkpoint_of("bert")
    plain = load_whole_model(folder, open_checkpoint(folder).class_name, dtype=torch.float32)
    student, linears = rounded(folder, QuantizeCompressor(), linears="int8")
    paths = attention_linears(open_checkpoint(folder))
    assert len(paths) > 0
    before, base = (getattr(each, each.base_model_prefix, each) for each in (plain, student))
    for path in paths:
        weight = before.get_submodule(path).weight
        assert torch.equal(
            base.get_submodule(path).weight, fake_quantize(weight, num_bits=8, group_size=None)
        )
    assert {id(base.get_submodule(path)) for path in paths} <= {id(linear) for linear in linears}


class Second(Alone):
    """The second of two processes, for which the first one's share is as its own."""

    mine = range(1, 2)

    def __init__(self) -> None:
        self.size = 2


def test_the_first_worker_alone_writes_and_answers(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second works on its share of every step, and on none once there is a result."""
    healed: list[int] = []

    def share_of_second(job: HealJob) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(stage, "find_team", lambda size: Second())
            patch.setattr(stage, "_heal", lambda job, team: healed.append(team.size) or heal(job, team))
            assert heal_job(job) is None
        return job.scratch.load(stage.RESULT) is not None

    def both(job: HealJob) -> Any:
        assert not share_of_second(job) and job.scratch.load_newest(stage.PROGRESS) is None
        result = heal_job(job)
        assert share_of_second(job)
        return result

    heal = stage._heal
    monkeypatch.setattr(stage, "heal_job", both)
    ffsplit.compress(small_job.config(tmp_path / "out", recipe=small_job.recipe(more=HEALING)))
    assert healed == [2]
