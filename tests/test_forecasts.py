"""A plan says what compressing gives: the same sizes, widths and heavy hitters, without a model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import ffsplit
from ffsplit import api
from ffsplit.calibration.statistics_file import read_statistics
from ffsplit.cli import main
from ffsplit.config import Budget
from ffsplit.errors import BudgetError
from ffsplit.forecasts import Plans, checked_budget, plan
from ffsplit.splitting.scores import output_energy
from tests.small_jobs import LOW_RANK, PRUNE, SmallJob


@pytest.mark.parametrize(
    ("rule", "step", "after", "max_bytes"),
    [
        ({"heavy_share": 1}, PRUNE, "", 40_000),
        ({"heavy_share": 0.5}, LOW_RANK, "", 40_000),
        ({"heavy_energy": 0.6}, PRUNE, "", 40_000),
        ({"heavy_share": 1}, PRUNE, "after_healing: {kind: quantize}", 10_000),
        ({"heavy_share": 1}, PRUNE, "after_healing: {kind: quantize, num_bits: 4, group_size: 8}", 10_000),
    ],
)
def test_the_sizes_are_those_that_compress_makes(
    rule: dict[str, float], step: str, after: str, max_bytes: int, small_job: SmallJob, tmp_path: Path
) -> None:
    recipe = small_job.recipe(**rule, step=step, more=after)  # type: ignore[arg-type]
    original, small_job.model = small_job.model, tmp_path / "copy"
    shutil.copytree(original, small_job.model)
    statistics = api.calibrate(small_job.config(tmp_path / "stats", recipe=recipe))
    shutil.rmtree(small_job.model)  # no model is needed to plan
    budgets = [checked_budget("keep", 0.4), checked_budget("max_bytes", max_bytes)]
    plans = plan(f"{tmp_path}/stats/{statistics.run_key}", budgets=budgets)
    small_job.model = original
    given = ({"keep": 0.4}, {"keep": None, "max_bytes": max_bytes})
    for forecast, fields in zip(plans.budgets, given, strict=True):
        manifest = ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe, **fields))
        assert manifest.measurements is not None
        size = manifest.measurements.compressed_size
        assert forecast.num_parameters == size.num_parameters
        assert forecast.num_parameters_without_embeddings == size.num_parameters_without_embeddings
        assert (forecast.ffn_elements, forecast.ffn_bytes) == (size.ffn_elements, size.ffn_bytes)
        assert forecast.plain == manifest.plain
        for planned, made in zip(forecast.layers, manifest.layers, strict=True):
            assert planned.layout == made.layout
            assert (planned.num_elements, planned.size_bytes) == (made.num_elements, made.size_bytes)
            assert len(planned.heavy_neurons) == made.num_heavy_hitters
        if "max_bytes" in fields:
            assert size.ffn_bytes <= max_bytes


def test_the_predicted_error_is_the_energy_outside_the_heavy_hitters(
    small_job: SmallJob, tmp_path: Path
) -> None:
    manifest = ffsplit.compress(small_job.config(tmp_path / "out"))
    path = tmp_path / "out" / manifest.run_key / manifest.attempt / "stats/neurons.parquet"
    plans = plan(str(tmp_path / "out"))
    errors = [forecast.energy_outside for forecast in plans.budgets]
    assert errors == sorted(errors), "less budget, more energy outside"
    for layer, stats in zip(plans.budgets[0].layers, read_statistics(path), strict=True):
        energy = output_energy(stats)
        inside = energy[list(layer.heavy_neurons)].sum()
        assert layer.energy_outside == pytest.approx(1 - inside / energy.sum())
    assert [each.neurons_for_energy for each in plans.concentration] == [
        layer.neurons_for_energy for layer in manifest.layers
    ]


def test_the_command_prints_tables_or_json(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.calibrate(small_job.config(tmp_path / "out"))
    command = ["plan", str(tmp_path / "out"), "--keep", "0.5", "0.25", "--max-parameters", "30000"]
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    for words in ("--keep 0.5", "--max-parameters 30000", "layer 2", "predicted error: fraction of"):
        assert words in printed
    assert main([*command, "--json"]) == 0
    plans = Plans.model_validate_json(capsys.readouterr().out)
    assert [each.budget for each in plans.budgets] == [
        Budget(kind="keep", limit=0.5),
        Budget(kind="keep", limit=0.25),
        Budget(kind="max_parameters", limit=30_000),
    ]


def test_another_recipe_and_the_usual_budgets(small_job: SmallJob, tmp_path: Path) -> None:
    api.calibrate(small_job.config(tmp_path / "out"))
    plans = plan(str(tmp_path / "out"), recipe="paper")
    assert plans.recipe == "paper"
    assert [each.budget.limit for each in plans.budgets] == [0.75, 0.5, 0.3535, 0.25, 0.2, 0.125]


def test_a_multiple_of_widths_is_forecast_and_what_it_gives_up(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """96 neurons: half are 47, for the output bias counts, and 32 are a multiple of 16."""
    api.calibrate(small_job.config(tmp_path / "out"))
    command = ["plan", str(tmp_path / "out"), "--keep", "0.5"]
    capsys.readouterr()
    for multiple, width in (("16", 32), ("1", 47)):
        assert main([*command, "--width-multiple", multiple, "--json"]) == 0
        (forecast,) = Plans.model_validate_json(capsys.readouterr().out).budgets
        assert {layer.layout.num_neurons for layer in forecast.layers} == {width}
        assert forecast.keep_unrounded == pytest.approx((47 * 65 + 32) / (96 * 65 + 32))
        assert forecast.keep == pytest.approx((width * 65 + 32) / (96 * 65 + 32))
        assert main([*command, "--width-multiple", multiple]) == 0
        printed = capsys.readouterr().out
        assert (f"{forecast.keep:.4g} of {forecast.keep_unrounded:.4g}" in printed) == (multiple == "16")
        assert ("not rounded" in printed) == (multiple == "16")


def test_bad_input_is_one_line(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.calibrate(small_job.config(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for arguments, expected in (
        ([tmp_path / "out", "--keep", "0.5", "0.0001"], r"--keep 0.0001 .* smallest is 0\.\d+"),
        ([tmp_path / "out", "--max-bytes", "100"], r"--max-bytes 100 .* smallest is \d+"),
        ([tmp_path / "out", "--keep", "2"], "--keep should be less than or equal to 1"),
        ([tmp_path / "out", "--max-latency-ms", "5"], "--latency-table"),
        ([tmp_path / "empty"], "holds no artifact"),
        ([tmp_path / "out", "--recipe", "fats"], "did you mean 'fast'"),
        ([tmp_path / "out", "--width-multiple", "97"], "give at most its 96 neurons"),
        ([tmp_path / "out", "--width-multiple", "0"], "--width-multiple should be greater than"),
    ):
        assert main(["plan", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert re.search(expected, captured.err), captured.err


def test_a_budget_that_cannot_be_met_is_not_left_out(small_job: SmallJob, tmp_path: Path) -> None:
    api.calibrate(small_job.config(tmp_path / "out"))
    with pytest.raises(BudgetError):
        plan(str(tmp_path / "out"), budgets=[Budget(kind="max_parameters", limit=10)])


def test_usual_budgets_that_a_recipe_cannot_meet_are_left_out(small_job: SmallJob, tmp_path: Path) -> None:
    """A budget that was asked for is refused; those of no budget at all are what can be met."""
    recipe = small_job.recipe(step="{kind: quantize}")
    statistics = api.calibrate(small_job.config(tmp_path / "stats"))
    uri = f"{tmp_path}/stats/{statistics.run_key}"
    assert plan(uri, budgets=[], recipe=recipe).budgets == ()
    with pytest.raises(BudgetError):
        plan(uri, budgets=[checked_budget("keep", 0.5)], recipe=recipe)


def test_what_is_left_out_counts_as_it_does_in_a_run(small_job: SmallJob, tmp_path: Path) -> None:
    """Both layers have their width from one field of the config, and one layer stays as it is."""
    recipe = small_job.recipe(step="{kind: prune}")
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe, skip=("layer 0",)))
    assert manifest.measurements is not None
    (found,) = plan(str(tmp_path / "out"), budgets=[checked_budget("keep", 0.5)]).budgets
    size = manifest.measurements.compressed_size
    assert found.keep == manifest.keep and found.keep > 0.6
    assert (found.ffn_elements, found.ffn_bytes) == (size.ffn_elements, size.ffn_bytes)
    assert found.plain is manifest.plain is False
