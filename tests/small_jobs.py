"""Compression jobs small enough to run many times in the tests."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ffsplit import JobConfig
from ffsplit.run.checks import check_rows
from ffsplit.run.job import prepare
from ffsplit.run.needs import Needs
from ffsplit.store.commits import Kind
from tests.tiny_models import WORDS

RECIPE = """\
name: small
description: What tests run.
{rule}
steps: [{step}]
allocation: {allocation}
{more}
calibration: {{shard_size: {shard_size}, held_out: 8, sampled_tokens: 256}}
measurement: {{latency_shapes: [[1, 8], [2, 8]], latency_pairs: 1, peak_memory: false}}
"""
PRUNE = "{kind: prune, compensation: least_squares}"
LOW_RANK = "{kind: low_rank}"


HEALED_SHARDS: dict[str, Any] = {
    "shard_size": 1,
    "more": "healing: {epochs: 2, batch_rows: 8, learning_rate: .002, evaluations: 1, checkpoint_minutes: 0}",
}
"""Options of a recipe with every stage, and more shards than one task reduces."""


class SmallJob:
    """Makes configs of one tiny model, whose recipe and calibration text lie in a folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        generator = random.Random(0)
        sentences = [" ".join(generator.choices(WORDS, k=generator.randint(3, 12))) for _ in range(60)]
        self.text = folder / "text.txt"
        self.text.write_text("\n".join(sentences), "utf-8")
        self.folder, self.model = folder, model

    def recipe(
        self,
        *,
        heavy_share: float = 1,
        step: str = PRUNE,
        heavy_energy: float | None = None,
        allocation: str = "uniform",
        shard_size: int = 8,
        more: str = "",
    ) -> str:
        rule = f"heavy_share: {heavy_share}" if heavy_energy is None else f"heavy_energy: {heavy_energy}"
        text = RECIPE.format(rule=rule, step=step, allocation=allocation, more=more, shard_size=shard_size)
        path = self.folder / f"recipe-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
        path.write_text(text, "utf-8")
        return str(path)

    def config(self, out: Path | str, **fields: Any) -> JobConfig:
        defaults: dict[str, Any] = {
            "model": str(self.model),
            "out": str(out),
            "recipe": self.recipe(),
            "keep": 0.5,
            "calibration": (str(self.text),),
            "samples": 40,
            "max_length": 16,
            "runner": "serial",
        }
        return JobConfig(**(defaults | fields))

    def arguments(self, out: Path | str, *more: str) -> list[str]:
        """The same as a command line."""
        given = [str(self.model), "--out", str(out), "--recipe", self.recipe(), "--keep", "0.5"]
        return [*given, "--calibration", str(self.text), "--samples", "40", "--max-length", "16", *more]


def needs_of(config: JobConfig, *, kind: Kind = "model") -> Needs:
    """What --dry-run shows of a job, checked as it checks it."""
    run = prepare(config, kind=kind)
    check_rows(run)
    return run.needs


def digests(out: Path, *patterns: str) -> dict[str, str]:
    """sha256 by name of the files of the one attempt below `out`."""
    (attempt,) = (path.parent for path in out.glob("*/*/manifest.json"))
    paths = [path for pattern in patterns for path in attempt.glob(pattern)]
    assert paths, f"no {patterns} in {attempt}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def committed_digests(out: Path) -> dict[str, str]:
    """sha256 by name of the weights and statistics of the one committed attempt below `out`."""
    (commit,) = out.glob("*/commit.json")
    attempt = commit.parent / json.loads(commit.read_text())["attempt"]
    paths = [*attempt.glob("*.safetensors"), *attempt.glob("stats/*.parquet"), attempt / "config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def small_job(tmp_path: Path, checkpoint_of: Any) -> SmallJob:
    return SmallJob(tmp_path, checkpoint_of("bert"))
