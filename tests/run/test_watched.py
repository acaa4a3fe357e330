"""What pre-flight says of disk and memory is an upper bound of what a real run takes, and no absurd one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ffsplit.store.store import open_store
from tests.tiny_models import WORDS, save_checkpoint

pytestmark = pytest.mark.slow

MOST = 2.0
"""What is foreseen is at most this many times what was there."""
RECIPE = """\
name: watched
description: What is watched.
heavy_share: 1
steps: [{kind: prune, compensation: least_squares}, {kind: distill, num_steps: 3}]
%s
calibration: {shard_size: 64, held_out: 32, sampled_tokens: 8192}
measurement: {latency_shapes: [[1, 16]], latency_pairs: 1, peak_memory: false}
"""
SEARCH = "allocation: search\nrefits: [{num_steps: 3}, {num_steps: 3}]"
HEALED = "healing: {epochs: 1, batch_rows: 64, checkpoint_minutes: 0}"
INT8 = f"{HEALED}\nafter_healing: {{kind: quantize}}\nlinears: int8"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of a BERT, half of it FFNs: 17 MB, beside which documents are small."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024, "vocab_size": 4000}
    return save_checkpoint(tmp_path_factory.mktemp("model"), "bert", **sizes)


def watched(folder: Path, model: str, more: str, **fields: Any) -> tuple[dict[str, int], dict[str, int]]:
    """What was foreseen, and the most that was there."""
    generator = random.Random(0)
    rows = (" ".join(generator.choices(WORDS, k=generator.randint(40, 60))) for _ in range(200))
    (folder / "text.txt").write_text("\n".join(rows))
    (folder / "recipe.yaml").write_text(RECIPE % more)
    for name in ("tmp", "cache"):
        (folder / name).mkdir()
    config = {
        "model": model,
        "out": str(folder / "out"),
        "recipe": str(folder / "recipe.yaml"),
        "keep": 0.5,
        "calibration": [str(folder / "text.txt")],
        "samples": 128,
        "max_length": 64,
        "runner": "serial",
    }
    (folder / "config.json").write_text(json.dumps(config | fields))
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.watched", str(folder / "config.json")],
        env=os.environ | {"TMPDIR": str(folder / "tmp"), "FFSPLIT_CACHE": str(folder / "cache")},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    print(
        {
            name: f"{peak / 1e6:.1f} of {said['foreseen'][name] / 1e6:.1f}"
            for name, peak in said["peaks"].items()
        }
    )
    return said["foreseen"], said["peaks"]


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("more", "fields"),
    [("", {}), (SEARCH, {}), ("", {"block_by_block": True}), (HEALED, {}), (INT8, {})],
    ids=["plain", "search and refits", "block by block", "healing", "healing and int8"],
)
def test_a_run_takes_what_is_foreseen(more: str, fields: dict[str, Any], model: Path, tmp_path: Path) -> None:
    foreseen, peaks = watched(tmp_path, str(model), more, **fields)
    assert peaks["temporary"] > 10e6 and peaks["store"] > 30e6, "nothing was watched"
    assert foreseen["cache"] == peaks["cache"] == 0
    for name in ("temporary", "store", "memory"):
        assert peaks[name] <= foreseen[name] <= MOST * peaks[name], name


@pytest.mark.subprocess
@pytest.mark.s3
def test_what_is_fetched_from_a_store_is_foreseen_too(model: Path, tmp_path: Path, s3_uri: str) -> None:
    """The model, in the cache; layers and healed weights, in temporary files until the driver ends."""
    store = open_store(s3_uri)
    for path in model.iterdir():
        store.put_file(f"model/{path.name}", path)
    more = f"{SEARCH}\n{INT8}"
    foreseen, peaks = watched(tmp_path, f"{s3_uri}/model", more, out=f"{s3_uri}/out")
    assert peaks["cache"] > 17e6 and peaks["temporary"] > 40e6
    for name in ("temporary", "cache", "memory"):
        assert peaks[name] <= foreseen[name] <= MOST * peaks[name], name
