"""Attention that is not installed: one line that says what to give, and a run that works with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import check_complete, empty_model, load_base_model, load_whole_model, random_model
from ffsplit.models.load_options import attending, attention_advice, chosen_attention
from ffsplit.run.job import prepare
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob, needs_of
from tests.tiny_models import random_rows

ADVICE = "config.json names the attention 'flash_attention_2': give --attn-implementation sdpa or eager"
CPU = torch.device("cpu")


@pytest.fixture
def flash(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(checkpoint_of("llama", head="ForCausalLM"), tmp_path / "flash"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    return directory


def test_every_load_says_what_to_give(flash: Path) -> None:
    checkpoint = open_checkpoint(flash)
    loads: list[Any] = [
        lambda: check_complete(checkpoint),
        lambda: load_base_model(checkpoint, device=CPU, dtype=torch.float32),
        lambda: load_whole_model(flash, "LlamaForCausalLM"),
        lambda: empty_model(checkpoint, class_name=None, dtype=torch.float32),
        lambda: random_model(checkpoint, dtype=torch.float32),
    ]
    for load in loads:
        with pytest.raises(ConfigError, match="FlashAttention2") as caught:
            load()
        message = str(caught.value)
        assert message.startswith(f"{flash} does not load: ") and message.endswith(ADVICE)
        with attending("eager"):
            load()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_runs_with_what_is_given(
    flash: Path, checkpoint_of: CheckpointFactory, attention: Any
) -> None:
    ids = torch.tensor(random_rows(1, seed=3))
    with attending(attention):
        model = load_whole_model(flash, "LlamaForCausalLM")
    assert model.config._attn_implementation == attention
    dense = load_whole_model(checkpoint_of("llama", head="ForCausalLM"), "LlamaForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_run_refuses_it_or_takes_the_flag(flash: Path, tmp_path: Path, capsys: Any) -> None:
    job, out = SmallJob(tmp_path, flash), tmp_path / "out"
    flags = ["--runner", "serial"]
    capsys.readouterr()
    assert main(["compress", *job.arguments(out, *flags)]) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"{ADVICE}\n") and error.count("\n") == 1 and not out.exists()
    assert main(["compress", *job.arguments(out, *flags, "--attn-implementation", "flash_attention_2")]) == 2
    capsys.readouterr()
    given = ["--attn-implementation", "sdpa"]
    assert main(["compress", *job.arguments(out, *flags, *given)]) == 0
    (attempt,) = (path.parent for path in out.glob("*/*/manifest.json"))
    assert json.loads((attempt / "config.json").read_text())["attn_implementation"] == "flash_attention_2"
    assert "sdpa" not in (attempt / "config.json").read_text()
    capsys.readouterr()
    timing = ["benchmark", str(out), "--against", str(flash), "--pairs", "1", "--no-publish"]
    timing += ["--batch-sizes", "1", "--lengths", "4"]
    assert main(timing) == 2
    assert capsys.readouterr().err.endswith(f"{ADVICE}\n")
    assert main([*timing, *given]) == 0


def test_the_flag_is_part_of_the_run_key_where_it_is_given(small_job: SmallJob, tmp_path: Path) -> None:
    keys = [
        prepare(small_job.config(tmp_path / "out", attn_implementation=given)).keys.run
        for given in (None, "sdpa", "eager")
    ]
    assert len(set(keys)) == 3


def test_only_what_may_be_missing_is_named() -> None:
    assert attention_advice({"attn_implementation": "flash_attention_2"}) == ADVICE
    assert attention_advice({"text_config": {"_attn_implementation": "flash_attention_2"}}) == ADVICE
    assert attention_advice({"attn_implementation": {"vision": "flash_attention_2"}}) == ADVICE
    assert attention_advice({"attn_implementation": "sdpa", "text_config": {"hidden_act": "x"}}) == ""
    with attending("sdpa"):
        assert attention_advice({"attn_implementation": "flash_attention_2"}) == ""
        with attending(None):
            assert chosen_attention() == "sdpa"
    assert chosen_attention() is None


def test_a_dry_run_refuses_what_a_run_refuses(flash: Path, small_job: SmallJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=ADVICE):
        needs_of(small_job.config(tmp_path / "out", model=str(flash)))
    assert needs_of(small_job.config(tmp_path / "out", model=str(flash), attn_implementation="eager"))
