"""Runs of models that are not held whole give what runs of whole models give."""

from __future__ import annotations

from pathlib import Path

import pytest

import ffsplit
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob, digests

WEIGHTS = ("*.safetensors", "stats/*.parquet", "config.json")


@pytest.mark.parametrize(("family", "dtype"), [("bert", "float32"), ("llama", "bfloat16")])
def test_block_by_block_gives_the_same_bytes_under_the_same_key(
    checkpoint_of: CheckpointFactory, tmp_path: Path, family: str, dtype: str
) -> None:
    head = "ForCausalLM" if family == "llama" else ""
    job = SmallJob(tmp_path, checkpoint_of(family, head=head, max_shard_size="30KB"))
    whole, blocks = tmp_path / "whole", tmp_path / "blocks"
    first = ffsplit.compress(job.config(whole, dtype=dtype))
    second = ffsplit.compress(job.config(blocks, dtype=dtype, block_by_block=True))
    assert first.run_key == second.run_key
    assert digests(whole, *WEIGHTS) == digests(blocks, *WEIGHTS)
    a, b = first.measurements, second.measurements
    assert a is not None and b is not None
    assert a.fidelity == b.fidelity and a.compressed_size == b.compressed_size
    assert a.latency and not a.blocks and not a.skipped
    assert not b.latency and len(b.blocks) == 3 and "latency" in b.skipped[0]
    (report,) = blocks.glob("*/*/report.html")
    assert "Block after block" in report.read_text() and "Not measured: latency" in report.read_text()
