"""Checks FFNs that were guessed from a model's structure: an exact split of them must change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffsplit.errors import UnsupportedModelError, explained
from ffsplit.ffn.activations import activation_named
from ffsplit.ffn.weights import FFNWeights
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.load import load_base_model
from ffsplit.models.streamed import StreamedModel
from ffsplit.runtime.ffn_tensors import load_ffn
from ffsplit.runtime.modules import install_split_ffn

TOLERANCE = 1e-4
"""Largest difference of an output, as a fraction of the largest output."""
CPU = torch.device("cpu")


class _Halves(nn.Module):
    """An FFN as the sum of two halves of its neurons."""

    def __init__(self, weights: FFNWeights) -> None:
        super().__init__()
        self._split = weights.split(torch.arange(0, len(weights.parts[0].neurons), 2))

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self._split(x.reshape(-1, x.shape[-1]))
        return flat.reshape(x.shape)


def check_by_trial(checkpoint: Checkpoint, *, block_by_block: bool) -> None:
    """Split every FFN exactly and run the model on random tokens, whole or block by block.

    Raises UnsupportedModelError if its outputs, or a block's, differ from the dense ones: the guess is wrong.
    """
    ids = torch.randint(checkpoint.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with explained(
        f"{checkpoint.architecture.model_type} is not in the table of architectures, and a trial of the FFNs "
        "guessed from its structure failed",
        kind=UnsupportedModelError,
    ):
        difference = (_difference_of_blocks if block_by_block else _difference)(checkpoint, inputs)
    if not difference <= TOLERANCE:
        first = checkpoint.ffns[0]
        raise UnsupportedModelError(
            f"{checkpoint.architecture.model_type} is not in the table of architectures; {first.block}: "
            f"{first.paths.up} and {first.paths.down} looked like its FFNs, but an exact split of them "
            f"changes the model's outputs (by {difference:.1e})"
        )


@torch.no_grad()
def _difference(checkpoint: Checkpoint, inputs: dict[str, Tensor]) -> float:
    model = load_base_model(checkpoint, device=CPU, dtype=torch.float32)
    expected = model(**inputs)[0]
    for ffn in checkpoint.ffns:
        _split_exactly(model.get_submodule(ffn.block), checkpoint, ffn)
    return _relative(model(**inputs)[0], expected)


def _difference_of_blocks(checkpoint: Checkpoint, inputs: dict[str, Tensor]) -> float:
    """The largest difference after any block. The same rows go through the dense and the split blocks."""
    model = StreamedModel(checkpoint, device=CPU, dtype=torch.float32)
    model.start([inputs, inputs])
    differences = []
    for index, path in enumerate(model.block_paths):
        with model.block(index) as block:
            expected = _states(model.advance(0))
            for ffn in checkpoint.ffns:
                if ffn.block == path:
                    _split_exactly(block, checkpoint, ffn)
            differences.append(_relative(_states(model.advance(1)), expected))
    return max(differences)


def _split_exactly(block: nn.Module, checkpoint: Checkpoint, ffn: FFNPlace) -> None:
    activation = activation_named(checkpoint.activation_of(ffn.index))
    weights = load_ffn(checkpoint, ffn.index, activation=activation, device=CPU)
    install_split_ffn(block, ffn.paths, _Halves(weights))


def _states(output: Any) -> Tensor:
    """A block's hidden states: its output, or the first item of it."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
