"""The identities of the other files on a trained model, where development data is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffsplit.calibration.hooks import FFNObserver
from ffsplit.calibration.model_inputs import padded_batches, tokenize_rows
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_base_model, load_tokenizer, load_whole_model
from ffsplit.splitting.scores import energy_share
from tests.runtime.compressed import compress, outputs, reference


@pytest.mark.parametrize("recipe", ["paper", "norm-prune"])
def test_a_trained_llama_equals_its_reference(development_data: Path, tmp_path: Path, recipe: str) -> None:
    compressed = compress(development_data / "tiny-llama", tmp_path / "artifact", recipe=recipe)
    assert compressed.source.tensors[compressed.source.ffns[0].down.name].dtype == "F16"
    model = load_whole_model(compressed.directory, "LlamaForCausalLM", dtype=torch.float32)
    torch.testing.assert_close(outputs(model), outputs(reference(compressed)), atol=0.05, rtol=0.01)


@torch.no_grad()
def test_the_energy_of_heavy_hitters_of_a_trained_llama(development_data: Path) -> None:
    """The top 5 % of neurons hold .16 to .31 of the output energy, as measured when it was made."""
    checkpoint = open_checkpoint(development_data / "tiny-llama")
    with (development_data / "corpus" / "heldout.txt").open(encoding="utf-8") as file:
        rows = tokenize_rows(load_tokenizer(checkpoint), file.read(60_000).split("\n\n"), max_length=128)
    model = load_base_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    with FFNObserver(model, checkpoint.ffns) as observer:
        for batch in padded_batches(rows, batch_tokens=2048, pad_id=0):
            observer.next_batch(batch.arguments)
            model(**batch.arguments)
    shares = [energy_share(stats, fraction=0.05) for stats in observer.statistics()]
    assert min(shares) > 0.13 and max(shares) < 0.36
