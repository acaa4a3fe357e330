"""What is handed to the harness and taken from its answer, with a stand-in for the harness itself."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from ffsplit.errors import ConfigError
from ffsplit.measurement.tasks.base import Score
from ffsplit.measurement.tasks.language_model import HarnessTasks
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from tests.conftest import CheckpointFactory
from tests.tiny_models import make_model

RESULTS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "sample_len": 50, "acc,none": 0.25, "acc_stderr,none": "N/A"},
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.01},
        "wikitext": {"word_perplexity,none": 12.5},
    },
    "n-samples": {"arc_easy": {"original": 2376, "effective": 50}, "gsm8k": {"original": 8, "effective": 8}},
    "higher_is_better": {"arc_easy": {"acc": True}, "wikitext": {"word_perplexity": False}},
}


@pytest.fixture
def causal(checkpoint_of: CheckpointFactory) -> Checkpoint:
    return open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for lm-eval that remembers how it was called."""
    called: dict[str, Any] = {}

    class TaskManager:
        all_tasks = ("arc_easy", "gsm8k", "wikitext", "no_data")

        def load(self, names: list[str]) -> None:
            if "no_data" in names:
                raise ConnectionError("no route to the hub\nand more")

    def evaluate(**options: Any) -> dict[str, Any]:
        called.update(options)
        return RESULTS

    names = ("lm_eval", "lm_eval.tasks", "lm_eval.evaluator", "lm_eval.models", "lm_eval.models.huggingface")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["lm_eval"].__version__ = "0.4.9"
    modules["lm_eval.tasks"].TaskManager = TaskManager
    modules["lm_eval.evaluator"].simple_evaluate = evaluate
    modules["lm_eval.models.huggingface"].HFLM = lambda **options: options
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return called


@pytest.mark.usefixtures("harness")
def test_names_and_version_are_what_the_digest_is_of(
    causal: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = HarnessTasks.read("lm-eval:arc_easy, gsm8k", checkpoint=causal)
    assert (task.tasks, task.version, task.max_length) == (("arc_easy", "gsm8k"), "0.4.9", 160)
    assert task.texts == ()  # they are the harness's own: none is looked for in the calibration text
    assert task.digest != HarnessTasks.read("lm-eval:arc_easy", checkpoint=causal).digest
    monkeypatch.setattr(sys.modules["lm_eval"], "__version__", "0.5.0")
    assert task.digest != HarnessTasks.read("lm-eval:arc_easy,gsm8k", checkpoint=causal).digest


def test_the_arguments_and_the_answer(harness: dict[str, Any]) -> None:
    model, tokenizer = make_model("llama", head="ForCausalLM"), object()
    task = HarnessTasks(tasks=("arc_easy", "gsm8k", "wikitext"), version="0.4.9", max_length=160)
    assert task.score(model, tokenizer) == (
        Score("lm-eval arc_easy", "acc", 0.25, 50, True),
        Score("lm-eval gsm8k", "exact_match (strict-match)", 0.5, 8, None),
        Score("lm-eval wikitext", "word_perplexity", 12.5, 0, False),
    )
    assert harness["model"] == {
        "pretrained": model,
        "tokenizer": tokenizer,
        "max_length": 160,
        "batch_size": 1,
    }
    assert harness["tasks"] == ["arc_easy", "gsm8k", "wikitext"]


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("arc_esay", "lm-eval has no task 'arc_esay', did you mean 'arc_easy'"),
        ("arc_easy,", "name its tasks"),
        ("", "name its tasks"),
        (
            "no_data",
            r"its data cannot be fetched \(ConnectionError: no route to the hub\); check the network",
        ),
    ],
)
def test_tasks_that_cannot_be_had(causal: Checkpoint, tasks: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HarnessTasks.read(f"lm-eval:{tasks}", checkpoint=causal)


def test_a_missing_extra_names_the_command(causal: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'ffsplit\[eval\]'"):
        HarnessTasks.read("lm-eval:arc_easy", checkpoint=causal)


def test_an_encoder_is_refused(checkpoint_of: CheckpointFactory) -> None:
    checkpoint = open_checkpoint(checkpoint_of("bert"))
    with pytest.raises(ConfigError, match="needs a causal language model"):
        HarnessTasks.read("lm-eval:arc_easy", checkpoint=checkpoint)
