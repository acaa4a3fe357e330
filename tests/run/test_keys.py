"""What a run key depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ffsplit import compute_profile as profile
from ffsplit.run.job import Run, prepare
from tests.small_jobs import LOW_RANK, PRUNE, SmallJob


def test_the_run_key_names_what_is_computed(small_job: SmallJob, tmp_path: Path) -> None:
    def key(**fields: Any) -> str:
        return prepare(small_job.config(**({"out": tmp_path / "out"} | fields))).keys.run

    base = key()
    assert key(workers=7, out=tmp_path / "elsewhere") == base
    changes: list[dict[str, Any]] = [
        {"keep": 0.4},
        {"width_multiple": 4},
        {"samples": 39},
        {"max_length": 15},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"threads_per_worker": 2},
        {"recipe": small_job.recipe(heavy_share=0.5, step=LOW_RANK)},
        {"fresh": True},
    ]
    keys = [key(**change) for change in changes]
    small_job.text.write_text(small_job.text.read_text() + "\nthe one more of these", "utf-8")
    assert len({base, *keys, key()}) == len(changes) + 2


def test_what_a_recipe_says_of_itself_is_no_part_of_the_run(small_job: SmallJob, tmp_path: Path) -> None:
    text, other = Path(small_job.recipe()).read_text("utf-8"), tmp_path / "other.yaml"
    for old, new, is_same in (("What tests run", "Anything", True), ("name: small", "name: other", False)):
        other.write_text(text.replace(old, new), "utf-8")
        recipes = (small_job.recipe(), str(other))
        one, two = (prepare(small_job.config(tmp_path, recipe=each)).keys.run for each in recipes)
        assert (one == two) == is_same


def test_evaluation_data_is_part_of_the_run_and_not_of_the_statistics(
    small_job: SmallJob, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("a.csv", "b.csv", "same-as-a.csv")]
    for path, score in zip(paths, (1, 2, 1), strict=True):
        path.write_text(f"at home,one time,{score}\nmany people,her years,3\n")
    runs = [prepare(small_job.config(tmp_path / "out"))]
    runs += [prepare(small_job.config(tmp_path / "out", eval=(f"sts:{path}",))) for path in paths]
    assert len({run.keys.run for run in runs}) == 3
    assert runs[1].keys.run == runs[3].keys.run
    assert len({run.keys.statistics for run in runs}) == 1


def test_the_run_key_has_what_a_budget_resolves_to(small_job: SmallJob, tmp_path: Path) -> None:
    def run(**fields: Any) -> Run:
        return prepare(small_job.config(tmp_path, keep=None, **fields))

    model = run(max_bytes=40_000).solver.model
    used = model.bytes_of(run(max_bytes=40_000).layouts)
    assert run(max_bytes=40_000).keys.run == run(max_bytes=used).keys.run
    assert run(max_bytes=used - 1).keys.run != run(max_bytes=used).keys.run
    parameters = model.parameters_of(run(max_bytes=40_000).layouts)
    assert run(max_parameters=parameters).keys.run == run(max_bytes=used).keys.run


def test_gates_are_part_of_the_run_and_not_of_what_it_computes(small_job: SmallJob, tmp_path: Path) -> None:
    def run(*gates: str, **fields: Any) -> Run:
        return prepare(small_job.config(tmp_path / "out", gate=gates, **fields))

    bare, gated = run(), run("fidelity>=.9", "speedup@4x8 >= 1")
    assert bare.keys.run == bare.keys.work == gated.keys.work != gated.keys.run
    assert run("speedup@4x8 >= 1.0", "fidelity >= 0.90", "fidelity >= 0.9").keys.run == gated.keys.run
    assert run("fidelity >= 0.91", "speedup@4x8 >= 1").keys.run != gated.keys.run
    assert run("speedup >= 1.5").keys.run == run(require_speedup=1.5).keys.run
    assert (4, 8) in gated.measurement.latency_shapes


DISTILL = "{kind: prune, compensation: least_squares}, {kind: distill, num_steps: 5}"


def test_what_fits_multiply_in_is_decided_by_the_driver_and_part_of_the_run(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a cluster of two kinds of hosts would publish either's bytes under one key."""

    def run(step: str, *, able: bool, **fields: Any) -> Run:
        monkeypatch.setattr(profile, "multiplies_bfloat16", lambda device: able)
        more = "refits: [{kind: distill, num_steps: 5}]" if step == DISTILL else ""
        return prepare(small_job.config(tmp_path, recipe=small_job.recipe(step=step, more=more), **fields))

    with_it, without = run(DISTILL, able=True), run(DISTILL, able=False)
    assert with_it.keys.run != without.keys.run
    assert with_it.keys.statistics == without.keys.statistics
    for prepared, precision in ((with_it, "bfloat16"), (without, "no")):
        fits = [*prepared.recipe.steps[1:], *prepared.recipe.refits]
        assert [fit.model_dump()["mixed_precision"] for fit in fits] == [precision] * 2
    assert run(PRUNE, able=True).keys.run == run(PRUNE, able=False).keys.run
    assert run(DISTILL, able=True, dtype="float32").keys.run == without.keys.run


def test_healing_threads_are_the_cores_that_the_driver_may_use(
    small_job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are part of the key: a quota makes another one, unless they are set."""
    monkeypatch.setattr("ffsplit.run.job.usable_cores", lambda: 6)
    assert prepare(small_job.config("out")).healing_threads == 6
    assert prepare(small_job.config("out", healing_workers=4)).healing_threads == 1
    assert prepare(small_job.config("out", healing_threads=3)).healing_threads == 3
