"""The quality benchmark: what a decoder is scored on, and the page of the runs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import quality_text
from benchmarks.quality_page import Run, read_runs, write_page
from benchmarks.quality_text import (
    PROMPT_TOKENS,
    TextScore,
    cut_windows,
    domain_texts,
    read_scored,
    repeated_grams,
    repetition,
    score_domains,
)
from tests.tiny_models import WORDS, make_model, save_tokenizer

RUN = Run(
    case="a-decoder",
    recipe="refit",
    keep=0.5,
    seed=0,
    metric="perplexity",
    original=20.0,
    score=40.0,
    fidelity={"kl_divergence": 0.5},
    ffn_bytes=500,
    original_ffn_bytes=1000,
    num_rows=8,
    num_tokens=4096,
    hardware={"processor": "a", "num_cpus": 2},
    versions={"torch": "2", "transformers": "5", "algorithm": "1"},
    domains={"prose": TextScore(20.0, 40.0, 0.5, 0.4, 1023)._asdict()},
    repeated={"original": 0.1, "compressed": 0.25},
    seconds=12.0,
    peak_gpu_bytes=3_000_000_000,
    wall_s=20.0,
)


def test_windows_are_spread_over_the_text() -> None:
    assert cut_windows(range(100), length=10, most=2) == [list(range(10)), list(range(50, 60))]
    assert cut_windows(range(25), length=10, most=9) == [list(range(10)), list(range(10, 20))]
    assert cut_windows(range(4), length=10, most=9) == [[0, 1, 2, 3]]


def test_texts_whose_files_are_missing_are_left_out(tmp_path: Path) -> None:
    assert list(domain_texts(tmp_path)) == ["documentation", "source"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/heldout.txt").write_text("Some prose.", "utf-8")
    assert domain_texts(tmp_path)["prose"] == "Some prose."


def test_repeated_grams() -> None:
    assert repeated_grams([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repeated_grams([1] * 7) == pytest.approx(3 / 4)
    assert repeated_grams([1, 2]) == 0


def test_a_model_is_scored_on_texts_and_on_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        name: " ".join(random.Random(name).choices(WORDS, k=600)) for name in ("documentation", "source")
    }
    monkeypatch.setattr(quality_text, "domain_texts", lambda _: texts)
    model = make_model("llama", head="ForCausalLM").eval()
    scored = read_scored(tmp_path, save_tokenizer(tmp_path), longest=64, num_windows=3, num_prompts=5)
    assert {name: [len(row) for row in rows] for name, rows in scored.windows.items()} == {
        "documentation": [64] * 3,
        "source": [64] * 3,
    }
    assert [len(each) for each in scored.prompts] == [PROMPT_TOKENS] * 5
    scores = score_domains(model, model, scored.windows)
    assert scores["source"].perplexity == scores["source"].original > 1
    assert scores["source"].kl == 0 and scores["source"].num_tokens == 3 * 63
    alone = [repetition(model, [prompt], num_tokens=12) for prompt in scored.prompts]
    assert repetition(model, scored.prompts, num_tokens=12) == pytest.approx(sum(alone) / 5)


def test_a_page_keeps_the_runs_of_earlier_calls_and_names_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_page([RUN, replace(RUN, recipe="fast", score=30.0)], folder=tmp_path)
    better = {"prose": {**RUN.domains["prose"], "perplexity": 35.25, "kl": 0.4}}
    write_page([replace(RUN, domains=better), replace(RUN, keep=0.8, domains=better)], folder=tmp_path)
    assert [(run.recipe, run.keep) for run in read_runs(tmp_path / "quality.jsonl")] == [
        ("fast", 0.5),
        ("refit", 0.5),
        ("refit", 0.8),
    ]
    page = (tmp_path / "quality.md").read_text("utf-8")
    assert "| refit | **35.25** (0.400) | **35.25** (0.400) |" in page
    assert "| fast |  | 40.00 (0.500) |" in page
    assert "| refit | **25.00** | **25.00** |" in page
    assert "| refit | 12 s, 3.0 GB | 12 s, 3.0 GB | 1/2.0 |" in page
    assert "Not run: 0.9 all; 0.8 svd, " in page and "; 0.3535 all." in page
    assert max(map(len, (line for line in page.splitlines() if line.startswith("|")))) < 100


def test_the_page_can_be_made_of_the_runs_beside_it() -> None:
    """Also of those from before decoders were scored, which lack some fields."""
    folder = Path(__file__).parents[1] / "benchmarks"
    runs = read_runs(folder / "quality.jsonl")
    page = (folder / "quality.md").read_text("utf-8")
    assert runs and not [run.case for run in runs if f"## {run.case}\n" not in page]
