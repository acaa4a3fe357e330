"""`ffsplit benchmark`: a grid, limits beside speed-ups, and a record beside the publication."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import ffsplit
from ffsplit.api import calibrate
from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import Integer
from ffsplit.measurement.benchmark import Settings, benchmark
from ffsplit.measurement.latency import Work, work_of
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.modules import DenseLinear, LowRankLinear
from ffsplit.runtime.quantized_linear import QuantizedLinear
from ffsplit.store.artifact import locate
from ffsplit.store.benchmark_records import BenchmarkRecord
from ffsplit.store.gc import collect, plan
from ffsplit.store.pull import verify
from ffsplit.store.schema import read_record
from ffsplit.store.store import open_store
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob
from tests.tiny_families import save_checkpoint as save_family
from tests.tiny_models import save_checkpoint

QUICK = ("--pairs", "2", "--batch-sizes", "1", "2", "--lengths", "4", "9", "--no-memory")


def test_an_encoder_over_a_grid(small_job: SmallJob, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    manifest = ffsplit.compress(small_job.config(out))
    before = sorted(path.name for path in (out / manifest.run_key / manifest.attempt).rglob("*"))
    capsys.readouterr()
    assert main(["benchmark", str(out), *QUICK, "--json", "--against", str(small_job.model)]) == 0
    record = BenchmarkRecord.model_validate_json(capsys.readouterr().out)
    shapes = [(each.phase, each.batch_size, each.num_tokens) for each in record.timings]
    assert shapes == [("forward", rows, tokens) for rows in (1, 2) for tokens in (4, 9)]
    for each in record.timings:
        assert 0 < each.compressed.p50_ms <= each.compressed.p95_ms <= each.compressed.p99_ms
        assert 1 < each.limit < 2 and each.share_of_limit == pytest.approx(each.speedup / each.limit)
        assert each.limited_by == ("bytes" if each.batch_size * each.num_tokens < 8 else "multiplications")
    assert (record.model, record.against) == ("out", small_job.model.name)
    assert record.original.load_s > 0 and record.original.peak_memory_bytes is None
    (path,) = (out / manifest.run_key / "benchmarks").glob("*.json")
    assert json.loads(path.read_text())["attempt"] == manifest.attempt
    assert read_record(BenchmarkRecord, path.read_bytes(), name=path.name) == record
    assert sorted(each.name for each in (out / manifest.run_key / manifest.attempt).rglob("*")) == before


def test_the_store_lives_with_benchmarks(small_job: SmallJob, tmp_path: Path, capsys: Any) -> None:
    """They verify, list and go with their run."""
    out = tmp_path / "out"
    first = ffsplit.compress(small_job.config(out))
    assert main(["benchmark", str(out), *QUICK]) == 2
    said = capsys.readouterr().err
    assert f"was made from a local model, {small_job.model.name}: give its directory with --against" in said
    assert main(["benchmark", str(out), *QUICK, "--against", str(small_job.model)]) == 0
    printed = capsys.readouterr().out
    assert "appended:" in printed and "tokens/s" in printed and "by multiplications" in printed
    assert verify(str(out)).ok and main(["list", str(out)]) == 0
    ffsplit.compress(small_job.config(out, keep=0.25))
    location = locate(str(out))
    collect(location.store, plan(location.store, keep_last=1))
    assert not list((out / first.run_key).rglob("*.json"))


def test_a_causal_model_prefills_and_decodes(checkpoint_of: CheckpointFactory, capsys: Any) -> None:
    model = str(checkpoint_of("opt", head="ForCausalLM"))
    assert main(["benchmark", model, *QUICK, "--new-tokens", "3", "--json", "--device", "cpu"]) == 0
    record = BenchmarkRecord.model_validate_json(capsys.readouterr().out)
    assert [each.phase for each in record.timings] == ["prefill", "decode"] * 4
    assert all(each.limited_by == "bytes" and each.num_pairs == 3 for each in record.timings[1::2])
    assert record.run_key is None and all(each.limit == 1 for each in record.timings)


def test_decoding_leaves_room_for_a_prompt(checkpoint_of: CheckpointFactory, capsys: Any) -> None:
    """The model reads 160 tokens, of which 3 runs warm up."""
    model = str(checkpoint_of("opt", head="ForCausalLM"))
    assert main(["benchmark", model, *QUICK, "--new-tokens", "157", "--device", "cpu"]) == 2
    assert "--new-tokens 157 leaves no room for a prompt" in capsys.readouterr().err


def test_models_of_other_inputs_than_texts_are_refused(tmp_path: Path) -> None:
    model = save_family(tmp_path / "clip", "clip", "Model")
    with pytest.raises(ConfigError, match=r"times models that read single texts, and .*clip does not"):
        benchmark(str(model))


def test_statistics_are_no_model_to_time(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = calibrate(small_job.config(tmp_path / "out"))
    with pytest.raises(ConfigError, match="holds statistics, not a model"):
        benchmark(f"{tmp_path}/out/{manifest.run_key}")


@pytest.mark.s3
def test_an_original_that_has_changed_is_not_compared(
    small_job: SmallJob, tmp_path: Path, s3_uri: str
) -> None:
    model, store = f"{s3_uri}/model", open_store(f"{s3_uri}/model")
    for path in small_job.model.iterdir():
        store.put_file(path.name, path)
    ffsplit.compress(small_job.config(tmp_path / "out", model=model))
    settings = Settings(batch_sizes=(1,), lengths=(4,), pairs=1, memory=False)
    assert benchmark(str(tmp_path / "out"), settings=settings).run_key is not None
    other = save_checkpoint(tmp_path / "other", "bert", seed=1)
    store.put_file("model.safetensors", other / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{model} has changed since .* give --against"):
        benchmark(str(tmp_path / "out"), settings=settings)


@pytest.mark.slow
def test_peak_memory_of_both(checkpoint_of: CheckpointFactory) -> None:
    settings = Settings(batch_sizes=(1,), lengths=(4,), pairs=1, threads=1)
    record = benchmark(str(checkpoint_of("bert")), settings=settings)
    assert record.num_threads == 1
    assert record.original.peak_memory_bytes and record.compressed.peak_memory_bytes


def test_work_is_that_of_the_linear_layers(tmp_path: Path) -> None:
    """Per block of BERT: four matrices D x D and two D x N; a classifier has a pooler and a head."""
    path = save_checkpoint(tmp_path / "model", "bert", head="ForSequenceClassification")
    count = 3 * (4 * 32 * 32 + 2 * 32 * 96) + 32 * 32 + 32 * 2
    assert work_of(load_whole_model(path, "BertForSequenceClassification")) == Work(count, 4 * count)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (DenseLinear(6, 10, bias=True), Work(60, 240)),
        (LowRankLinear(6, 10, rank=2, bias=True), Work(32, 128)),
        (QuantizedLinear(Integer(num_bits=4, group_size=5), 6, 10, bias=True), Work(60, 6 * 5 + 2 * 6 * 2)),
        (Conv1D(6, 10), Work(60, 240)),
        (nn.LayerNorm(6), Work(0, 0)),
    ],
)
def test_work_of_every_kind_of_layer(layer: nn.Module, expected: Work) -> None:
    assert work_of(nn.Sequential(layer)) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch-sizes", "0"), "--batch-sizes must be 1 or more"),
        (("--lengths", "0"), "--lengths must be 1 or more"),
        (("--pairs", "0"), "--pairs and --threads"),
        (("--device", "cuda"), "--device cuda: torch finds no GPU"),
        (("--dtype", "float8"), "invalid choice"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint_of: CheckpointFactory, capsys: Any, monkeypatch: Any, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["benchmark", str(checkpoint_of("bert")), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
