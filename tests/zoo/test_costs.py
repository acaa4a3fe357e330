"""What a model cost: seconds of cores and GPUs, by the zoo file's prices."""

from __future__ import annotations

import pytest

from ffsplit.progress import Progress, Share, StageLog
from ffsplit.store.manifest import Environment
from ffsplit.store.scratch import Result
from ffsplit.zoo.batch import ModelResult, StageUse
from ffsplit.zoo.costs import cost_of, cost_of_stages
from tests.measurement.test_regressions import measured
from tests.store.attempts import ATTEMPT, RUN_KEY, make_manifest
from tests.zoo.test_page import model

STAGES = (
    StageUse(name="calibrate", wall_s=100, cpu_s=800, gpu_s=400),
    StageUse(name="measure", wall_s=10, cpu_s=10, gpu_s=10),
)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("prices", "gpu", "price"),
    [
        ({"H100": 2.5}, H100, 410 * 2.5 / 3600),
        ({"h100": 2.5, "CPU": 0.1}, H100, (410 * 2.5 + 810 * 0.1) / 3600),
        ({"H100": 2.5, "H100 80GB": 3.0, "A100": 1}, H100, 410 * 3.0 / 3600),
        ({"H100": 2.5}, None, 410 * 2.5 / 3600),
        ({"H100": 2.5, "A100": 1}, None, None),
        ({"A100": 1}, H100, None),
        ({"CPU": 0.1}, H100, None),
        ({}, H100, None),
    ],
)
def test_seconds_times_prices(prices: dict[str, float], gpu: str | None, price: float | None) -> None:
    """A GPU that the table does not have has no made-up price."""
    cost = cost_of_stages(STAGES, prices, gpu=gpu)
    assert (cost.cpu_s, cost.gpu_s) == (810, 410)
    assert cost.price == (None if price is None else pytest.approx(price, abs=1e-6))


def test_cores_alone_need_a_price_of_cores() -> None:
    cores = (StageUse(name="calibrate", wall_s=100, cpu_s=800, gpu_s=0),)
    assert cost_of_stages(cores, {"CPU": 0.36}, gpu=None).price == pytest.approx(0.08)
    assert cost_of_stages(cores, {"H100": 2.5}, gpu=None).price is None


def test_what_an_earlier_batch_published_costs_nothing_now() -> None:
    new, old = model("new", "published").result, model("old", "committed already").result
    assert new is not None and cost_of(new, {}) is not None
    assert old is not None and cost_of(old, {}) is None


def test_a_stage_reserves_its_workers_shares() -> None:
    """No more than it has items, and healing the threads of all its processes."""
    log = StageLog(Progress.to_user(), Share(cpus=2, gpus=0.5, num_workers=lambda: 4))
    answers = [(index, Result(name="shard", files=(), facts={}, reused=False)) for index in range(3)]
    log.collect("calibrate", "k", 3, iter(answers))
    with log.stage("heal", "k", num_items=1, workers=2, threads=8):
        pass
    with log.stage("measure", "k", num_items=1):
        pass
    for stage, (cpus, gpus) in zip(log.stages, ((6, 1.5), (16, 1.0), (2, 0.5)), strict=True):
        assert stage.cpu_s == pytest.approx(cpus * stage.wall_s, abs=0.01)
        assert stage.gpu_s == pytest.approx(gpus * stage.wall_s, abs=0.01)


def test_the_gpu_is_that_of_the_host_that_measured() -> None:
    """The driver may have none, or another."""
    manifest = make_manifest(run_key=RUN_KEY, attempt=ATTEMPT)
    on_gpu = measured().model_copy(update={"hardware": {"gpu": "NVIDIA H100 80GB HBM3"}})
    manifest = manifest.model_copy(
        update={
            "measurements": on_gpu,
            "environment": Environment(versions={}, hardware={"gpu": "NVIDIA A10G"}),
        }
    )
    assert ModelResult.of(manifest, state="published", report="r").gpu == "NVIDIA H100 80GB HBM3"
    manifest = manifest.model_copy(update={"measurements": None})
    assert ModelResult.of(manifest, state="published", report="r").gpu == "NVIDIA A10G"
