"""Shares of a step: what they add up to, and that the same number of them gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffsplit.healing.gradient import Distillation
from ffsplit.healing.loop import HealingState, heal, trainable_weights
from ffsplit.healing.losses import Distance
from ffsplit.healing.rows import HealingData
from ffsplit.healing.team import Alone, find_team
from tests.healing.test_heal import KINDS, data, disturbed, settled
from tests.tiny_models import make_model, random_rows

Weights = dict[str, Tensor]


class Plain:
    """What of accelerate's Accelerator a step uses, in full precision."""

    def autocast(self) -> Any:
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def gradients(family: str, head: str, makes: Any, *, rows: list[list[int]], size: int) -> dict[str, Tensor]:
    student = disturbed(family, head)
    weights = trainable_weights(student)
    teacher, batch = make_model(family, head=head), next(data().validation_batches())
    distillation = Distillation(Distance.of(student, teacher, batch, makes=makes), weights, Alone(size))
    distillation.set_gradient(rows, pad_id=0, accelerator=Plain())
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(("family", "head", "makes"), KINDS)
def test_the_shares_gradients_add_up_to_the_steps(family: str, head: str, makes: Any, size: int) -> None:
    """Rows of many lengths, and fewer rows than shares."""
    rows = random_rows(8, seed=3)
    assert len({len(row) for row in rows}) > 2
    for some in (rows, rows[: size - 1]):
        whole = gradients(family, head, makes, rows=some, size=1)
        shared = gradients(family, head, makes, rows=some, size=size)
        assert set(shared) == set(whole)
        for name, gradient in whole.items():
            torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-6)
        assert any(gradient.abs().max() > 1e-4 for gradient in whole.values())


def run(
    size: int, *, stop_at: int | None = None, path: Path | None = None, steps: int = 12
) -> dict[str, Tensor]:
    """Weights after healing in `size` shares, stopped at a step and taken up again where asked for."""
    rows, settings = data(), settled(epochs=2, batch_rows=8, learning_rate=1.5e-3, checkpoint_minutes=0)
    rows = HealingData(rows.rows[: 4 * steps], rows.validation, rows.pad_id, rows.batch_tokens)
    teacher, student = make_model("bert"), disturbed("bert", "")

    class Stopped(Exception):
        pass

    def checkpoint(state: HealingState, weights: dict[str, Tensor], optimizer: Any) -> None:
        if path is not None and state.step == stop_at:
            state.save(path, weights, optimizer)
            raise Stopped

    def resume(weights: dict[str, Tensor], optimizer: Any) -> HealingState | None:
        return HealingState.load(path, weights, optimizer) if path and path.exists() else None

    for _ in range(1 if stop_at is None else 2):
        try:
            student = disturbed("bert", "")
            heal(
                student,
                teacher,
                rows,
                makes="states",
                settings=settings,
                seed=0,
                resume=resume,
                checkpoint=checkpoint,
                team=Alone(size),
            )
        except Stopped:
            continue
    return {name: weight.detach() for name, weight in trainable_weights(student).items()}


def differing(one: Weights, other: Weights) -> list[str]:
    return [name for name, weight in one.items() if not torch.equal(weight, other[name])]


def test_the_same_shares_give_the_same_bytes_stopped_or_not(tmp_path: Path) -> None:
    once, stopped = run(2), run(2, stop_at=5, path=tmp_path / "state.safetensors")
    assert (tmp_path / "state.safetensors").exists()
    assert differing(once, stopped) == []
    assert differing(once, run(1)) != []  # so the number of shares has to be in the run key


def test_the_first_steps_are_those_of_one_worker() -> None:
    one, two = run(1, steps=2), run(2, steps=2)
    start = {name: each.detach() for name, each in trainable_weights(disturbed("bert", "")).items()}
    moved = float(torch.cat([(each - start[name]).flatten() for name, each in one.items()]).norm())
    apart = float(torch.cat([(each - two[name]).flatten() for name, each in one.items()]).norm())
    assert moved > 0.1
    assert apart < 1e-2 * moved  # Adam moves a weight whose gradient is rounding alone as far as any other


def test_without_a_process_group_one_process_does_all() -> None:
    team = find_team(3)
    assert (team.size, list(team.mine)) == (3, [0, 1, 2])
    assert team.sum([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])]).tolist() == [7.0]


def test_a_team_goes_on_only_from_one_step() -> None:
    class Behind(Alone):
        """Two, of which the other is a step behind."""

        def sum(self, values: Sequence[Tensor]) -> Tensor:
            return super().sum(values) - 1

    student = disturbed("bert", "")
    weights = trainable_weights(student)
    distance = Distance(student, student, "states", has_heads=False)
    Distillation(distance, weights, Alone(2)).meet(5)
    with pytest.raises(RuntimeError, match="from step 5 here and from another step elsewhere"):
        Distillation(distance, weights, Behind(2)).meet(5)


PROCESS = """\
import sys
import torch
from torch import distributed
from ffsplit.healing import team

rank, place, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method="file://" + place, rank=rank, world_size=2)
team.CHUNK_ELEMENTS = 3
found = team.find_team(2)
assert (found.size, list(found.mine)) == (2, [rank])
values = [torch.randn(4, 5, generator=torch.Generator().manual_seed(share)) for share in range(2)]
total = found.sum([values[rank]])
assert torch.equal(total, team.Alone(2).sum(values)) and total.shape == (4, 5)
assert found.sum([torch.tensor(float(rank + 1))]).item() == 3.0
distributed.destroy_process_group()
"""


@pytest.mark.subprocess
def test_two_processes_sum_as_one_does(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "meet"), str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
