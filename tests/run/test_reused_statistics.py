"""Statistics of an earlier run serve again, to the same bytes, and never those of another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit import JobConfig, api
from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.run.job import prepare
from ffsplit.run.stages.calibrate import CalibrationJob
from ffsplit.store.pull import verify
from tests.small_jobs import SmallJob, digests
from tests.tiny_models import MAX_POSITIONS

WEIGHTS = ("*.safetensors", "config.json", "stats/*.parquet")


def reusing(small_job: SmallJob, out: Path, stats: Path | str, **fields: Any) -> JobConfig:
    """A job that is told of the statistics alone, not of the text that they are from."""
    given = small_job.config(out, stats=str(stats), **fields).model_dump(exclude_unset=True)
    return JobConfig(**{k: v for k, v in given.items() if k not in ("calibration", "samples", "max_length")})


def test_the_same_bytes_as_a_run_that_collects_its_own(small_job: SmallJob, tmp_path: Path) -> None:
    statistics = api.calibrate(small_job.config(tmp_path / "stats"))
    alone = ffsplit.compress(small_job.config(tmp_path / "alone", keep=0.3))
    again = ffsplit.compress(reusing(small_job, tmp_path / "again", tmp_path / "stats", keep=0.3))
    assert digests(tmp_path / "again", *WEIGHTS) == digests(tmp_path / "alone", *WEIGHTS)
    assert verify(str(tmp_path / "again")).ok
    assert [stage.name for stage in again.stages] == ["sample", "compress", "measure"]
    assert again.run_key != alone.run_key
    origin = again.calibration.statistics_from
    assert origin is not None
    assert (origin.run_key, origin.attempt) == (statistics.run_key, statistics.attempt)
    assert origin.sampled_text_digest == again.calibration.text_digest == alone.calibration.text_digest
    assert again.calibration.model_copy(update={"statistics_from": None}) == alone.calibration


def test_the_rows_that_a_limit_of_tokens_left_are_lent(small_job: SmallJob, tmp_path: Path) -> None:
    recipe = (
        Path(small_job.recipe()).read_text("utf-8").replace("shard_size: 8", "shard_size: 8, max_tokens: 150")
    )
    (limited := tmp_path / "limited.yaml").write_text(recipe, "utf-8")
    fields = small_job.config(tmp_path / "stats", recipe=str(limited)).model_dump(exclude_unset=True)
    statistics = api.calibrate(JobConfig(**(fields | {"samples": None})))
    assert 3 < statistics.calibration.num_rows < 40
    assert 100 < statistics.calibration.num_tokens <= 150
    again = ffsplit.compress(reusing(small_job, tmp_path / "again", tmp_path / "stats", keep=0.3))
    assert again.calibration.statistics_from is not None
    assert again.calibration.statistics_from.sampled_text_digest == statistics.calibration.text_digest
    given = api.calibrate(small_job.config(tmp_path / "given", recipe=str(limited)))
    assert given.calibration.num_rows == 40


def test_only_what_the_sample_needs_is_read(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffsplit.run.stages.calibrate.MAX_SAMPLED_SHARDS", 2)
    ffsplit.compress(small_job.config(tmp_path / "stats"))
    again = ffsplit.compress(reusing(small_job, tmp_path / "again", tmp_path / "stats"))
    assert again.stages[0].num_items == 2 < again.calibration.num_shards
    assert digests(tmp_path / "again", *WEIGHTS) == digests(tmp_path / "stats", *WEIGHTS)
    assert CalibrationJob.model_fields["inputs_only"].default is False


@pytest.mark.parametrize("is_here", [True, False])
def test_the_text_that_is_here_comes_before_the_one_beside_the_store(
    is_here: bool, small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.calibrate(small_job.config(tmp_path / "stats"))
    (tmp_path / "here").mkdir()
    if is_here:
        shutil.copy(small_job.text, tmp_path / "here" / "text.txt")
    monkeypatch.chdir(tmp_path / "here")
    run = prepare(reusing(small_job, tmp_path / "again", tmp_path / "stats"))
    assert run.config.calibration == ("text.txt" if is_here else str(small_job.text),)


def test_the_run_key_has_the_digest_of_the_statistics(small_job: SmallJob, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        api.calibrate(small_job.config(tmp_path / name, seed=seed))
    keys = {
        prepare(small_job.config(tmp_path / "out", stats=str(tmp_path / name))).keys.run
        for name in ("one", "two", "one")
    }
    assert len(keys) == 2


def test_other_text_for_the_sample_is_recorded(small_job: SmallJob, tmp_path: Path) -> None:
    api.calibrate(small_job.config(tmp_path / "stats"))
    config = reusing(small_job, tmp_path / "out", tmp_path / "stats", samples=20)
    manifest = ffsplit.compress(config.model_copy(update={"samples": 20}))
    origin = manifest.calibration.statistics_from
    assert origin is not None and origin.sampled_text_digest != manifest.calibration.text_digest
    assert manifest.calibration.num_rows == 40


@pytest.mark.parametrize("case", ["model", "tokenizer", "dtype", "none", "changed"])
def test_statistics_that_do_not_hold_are_refused(
    case: str, small_job: SmallJob, tmp_path: Path, checkpoint_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = api.calibrate(small_job.config(tmp_path / "stats"))
    stats, flags, code = tmp_path / "stats", [], 2
    if case == "model":
        small_job.model, expected = checkpoint_of("bert", seed=5), "another model or revision"
    elif case == "tokenizer":
        model, expected = tmp_path / "model", "another tokenizer"
        shutil.copytree(small_job.model, model)
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 99}))
        small_job.model = model
    elif case == "dtype":
        flags, expected = (
            ["--dtype", "bfloat16"],
            "cpu in float32 with 1 threads, but this run is on",
        )
    elif case == "none":
        stats, expected = small_job.folder / "nothing", "holds no artifact"
        stats.mkdir()
    else:
        code, expected = 1, "does not match its manifest's sha256"
        path = stats / statistics.run_key / statistics.attempt / "stats/neurons.parquet"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial", "--stats", str(stats), *flags)
    capsys.readouterr()
    assert main(["compress", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and expected in captured.err
    assert not (tmp_path / "out").exists()


def test_statistics_of_other_ffns_are_refused(small_job: SmallJob, tmp_path: Path) -> None:
    api.calibrate(small_job.config(tmp_path / "stats", only=("layer 0",)))
    again = ffsplit.compress(reusing(small_job, tmp_path / "again", tmp_path / "stats", only=("layer 0",)))
    assert [layer.name for layer in again.layers] == ["layer 0"]
    for which in ({"only": ("layer 1",)}, {}):
        with pytest.raises(ConfigError, match="of other FFNs of this model: give the same --only"):
            ffsplit.compress(reusing(small_job, tmp_path / "other", tmp_path / "stats", **which))
    assert not (tmp_path / "other").exists()


def test_calibrate_takes_no_statistics(small_job: SmallJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--stats is for compress"):
        api.calibrate(small_job.config(tmp_path / "out", stats="anything"))


def test_the_window_of_perplexity_is_not_inherited(
    small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    """Or the same --eval would score otherwise with --stats than without."""
    small_job.model = checkpoint_of("llama", head="ForCausalLM")
    api.calibrate(small_job.config(tmp_path / "stats"))
    spec = (f"perplexity:{small_job.text}",)
    without = small_job.config(tmp_path / "out", eval=spec, max_length=None)
    with_statistics = reusing(small_job, tmp_path / "out", tmp_path / "stats", eval=spec)
    tasks = [prepare(config).evaluations[0].task for config in (without, with_statistics)]
    assert tasks[0].max_length == tasks[1].max_length == MAX_POSITIONS
