"""Whether a row that was guessed by structure is true: an exact split of every FFN must change nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffsplit.compressors.weights import FFNWeights
from ffsplit.errors import UnsupportedModelError
from ffsplit.models.activations import activation_named
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import load_base_model
from ffsplit.runtime.ffn_tensors import load_ffn
from ffsplit.runtime.split_ffn import install_split_ffn

TOLERANCE = 1e-4
"""Largest difference of an output, as a part of the largest output."""
CPU = torch.device("cpu")


class _Halves(nn.Module):
    """An FFN as the sum of two parts of its neurons."""

    def __init__(self, weights: FFNWeights) -> None:
        super().__init__()
        self._split = weights.split(torch.arange(0, len(weights.parts[0].neurons), 2))

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self._split(x.reshape(-1, x.shape[-1]))
        return flat.reshape(x.shape)


@torch.no_grad()
def check_by_trial(checkpoint: Checkpoint) -> None:
    """Split every FFN exactly and run the model on random tokens.

    Raises UnsupportedModelError when its outputs are not the dense model's: the guess was wrong.
    """
    model = load_base_model(checkpoint, device=CPU, dtype=torch.float32)
    ids = torch.randint(checkpoint.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids)[0]
    for ffn in checkpoint.ffns:
        activation = activation_named(checkpoint.activation_of(ffn.index))
        weights = load_ffn(checkpoint, ffn.index, activation=activation, device=CPU)
        install_split_ffn(model.get_submodule(ffn.block), ffn.paths, _Halves(weights))
    difference = float((model(input_ids=ids)[0] - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        first = checkpoint.ffns[0]
        raise UnsupportedModelError(
            f"{checkpoint.architecture.model_type} is not in the table of architectures; {first.block}: "
            f"{first.paths.up} and {first.paths.down} looked like its FFNs, but an exact split of them "
            f"changes the model's outputs (by {difference:.1e})"
        )
