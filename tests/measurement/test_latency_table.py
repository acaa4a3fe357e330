"""A latency table is measured at a dozen widths, and a budget in milliseconds goes by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit.cli import main
from ffsplit.compute_profile import ComputeProfile
from ffsplit.errors import ConfigError
from ffsplit.forecasts import checked_budget, plan
from ffsplit.measurement.latency_table import measure_latency_table, table_widths, write_latency_table
from ffsplit.report.humanize import milliseconds
from ffsplit.splitting.latency import LatencyTable
from tests.small_jobs import LOW_RANK, SmallJob
from tests.tiny_families import save_checkpoint
from tests.tiny_models import FAMILIES

CPU = ComputeProfile(device="cpu", dtype="float32", threads=1)


def made_up_table(small_job: SmallJob, path: Path, **changes: Any) -> Path:
    """A table of this machine with times that rise evenly."""
    table = measure_latency_table(str(small_job.model), shape=(2, 8), profile=CPU).model_dump(mode="json")
    table["points"] = [{"width": width, "ms": 1 + width / 96} for width in (4, 48, 96)]
    path.write_text(json.dumps(table | changes))
    return path


@pytest.mark.matrix(family=("bert", "llama", "opt"))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_timed_at_every_width(family: str, checkpoint_of: Any) -> None:
    path = checkpoint_of(family)
    table = measure_latency_table(str(path), shape=(1, 8), profile=CPU)
    widest = table.model_shape.shapes[0].num_neurons
    assert [point.width for point in table.points] == table_widths({widest})
    assert table.points[-1].width == widest and len(table.points) == 12
    assert all(point.ms > 0 for point in table.points)


@pytest.mark.parametrize("family", ["t5", "vit", "clip", "wav2vec2"])
def test_what_reads_more_than_tokens_is_timed_too(family: str, tmp_path: Path) -> None:
    table = measure_latency_table(str(save_checkpoint(tmp_path, family)), shape=(1, 8), profile=CPU)
    assert len(table.points) == 12 and all(point.ms > 0 for point in table.points)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral"])
def test_ffns_of_other_matrices_have_no_table(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FFNs of separate linear layers, unlike those of layer 0"):
        measure_latency_table(str(save_checkpoint(tmp_path, family)), shape=(1, 8), profile=CPU)


def test_a_table_that_cannot_be_written(small_job: SmallJob, tmp_path: Path) -> None:
    table = LatencyTable.model_validate_json(made_up_table(small_job, tmp_path / "t.json").read_text())
    with pytest.raises(ConfigError, match=r"--out .*t\.json cannot be written: No such file"):
        write_latency_table(table, f"{tmp_path}/gone/t.json")


def test_layers_of_different_widths_have_no_table() -> None:
    with pytest.raises(ConfigError, match="the same width"):
        table_widths({96, 64})
    assert table_widths({1536})[:4] == [64, 128, 192, 256]
    assert len(table_widths({3})) == 3


def test_the_command_writes_a_table_that_compress_takes(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    command = ["latency-table", str(small_job.model), "--out", str(path), "--batch-size", "2", "--num-tokens"]
    assert main([*command, "8"]) == 0
    printed = capsys.readouterr().out
    assert "written to" in printed and "measured" in printed and "fitted" in printed
    table = LatencyTable.model_validate_json(path.read_text())
    assert milliseconds(table.ms(24)) in printed
    assert (table.batch_size, table.num_tokens) == (2, 8)
    limit = table.ms(96) * 1.01
    config = small_job.config(tmp_path / "out", keep=None, max_latency_ms=limit, latency_table=str(path))
    manifest = ffsplit.compress(config)
    assert manifest.budget is not None and manifest.budget.kind == "max_latency_ms"
    assert manifest.measurements is not None
    assert (2, 8) in {(each.batch_size, each.num_tokens) for each in manifest.measurements.latency}
    assert main([*command, "9999"]) == 2
    capsys.readouterr()
    for flag in ("--batch-size", "--num-tokens", "--threads"):
        assert main([*command, "8", flag, "0"]) == 2
        assert capsys.readouterr().err == f"ffsplit: {flag} must be 1 or more, not 0\n"
    assert main(["latency-table", str(small_job.model), "--out", f"{tmp_path}/none/t.json"]) == 2


def test_the_widest_layers_within_the_target(small_job: SmallJob, tmp_path: Path) -> None:
    path = made_up_table(small_job, tmp_path / "t.json")
    config = small_job.config(tmp_path / "out", keep=None, max_latency_ms=1.5, latency_table=str(path))
    manifest = ffsplit.compress(config)
    assert {layer.layout.num_neurons for layer in manifest.layers} == {48}
    assert manifest.plain
    budget = checked_budget("max_latency_ms", 1.5, latency_table=str(path))
    plans = plan(str(tmp_path / "out"), budgets=[budget], latency_table=str(path))
    assert [layer.layout for layer in plans.budgets[0].layers] == [layer.layout for layer in manifest.layers]


@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({"hardware": {"processor": "other"}}, [], "from another machine"),
        ({}, ["--max-latency-ms", "0.5"], "the smallest is 1.042"),
        ({"dtype": "bfloat16"}, [], "measured in bfloat16"),
        ({"points": []}, [], "points"),
        ({}, ["--keep", "0.5"], "--keep and --max-latency-ms are 2 budgets"),
        ({}, ["--max-bytes", "5000"], "--max-bytes and --max-latency-ms are 2 budgets"),
    ],
)
def test_bad_latency_input_is_one_line(
    changes: dict[str, Any],
    flags: list[str],
    expected: str,
    small_job: SmallJob,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = made_up_table(small_job, tmp_path / "t.json", **changes)
    arguments = [str(small_job.model), "--out", str(tmp_path / "out"), "--recipe", small_job.recipe()]
    arguments += ["--max-latency-ms", "1.5", "--latency-table", str(path), *flags, "--runner", "serial"]
    assert main(["compress", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and expected in captured.err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_factorises_has_no_latency_budget(small_job: SmallJob, tmp_path: Path) -> None:
    path = made_up_table(small_job, tmp_path / "t.json")
    recipe = small_job.recipe(heavy_share=0.5, step=LOW_RANK)
    with pytest.raises(ConfigError, match="narrower"):
        ffsplit.compress(
            small_job.config(
                tmp_path / "out", recipe=recipe, keep=None, max_latency_ms=1.5, latency_table=str(path)
            )
        )
