"""Steps replayed from a CUDA graph are the steps."""

from __future__ import annotations

import pytest
import torch

from ffsplit.compressors.base import LayerContext, relative_error
from ffsplit.compressors.distill import DistillCompressor
from ffsplit.compressors.replayed import EAGER_STEPS, repeat
from ffsplit.ffn.activations import ACTIVATIONS, XIELU
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("times", [0, 1, EAGER_STEPS, EAGER_STEPS + 1, 50])
def test_every_step_is_made_once(times: int) -> None:
    total = torch.zeros(1, dtype=torch.long, device="cuda")
    repeat(lambda: total.add_(1), times=times)
    assert int(total) == times


def fitted(activation: object, device: str) -> float:
    """The error that a fit leaves, in float32."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).to(device)

    up, gate, down = weight(48, 16), weight(48, 16), weight(16, 48)
    whole = FFNPart(torch.arange(48), *(LinearMap.dense(each) for each in (up, gate, down)))
    original = FFNWeights(heavy=whole, light=None, down_bias=None, activation=activation)  # type: ignore[arg-type]
    context = LayerContext(original, [torch.randn(512, 16, generator=generator).to(device)])
    narrow = original.split(torch.arange(24))
    narrow = FFNWeights(narrow.heavy, None, None, original.activation)
    step = DistillCompressor(num_steps=40, batch_tokens=64, mixed_precision="no")
    return relative_error(step.compress(narrow, layout=narrow.layout, context=context), context)


@pytest.mark.parametrize("name", [*sorted(ACTIVATIONS), "xielu"])
def test_a_fit_on_a_gpu_learns_as_much_as_on_a_cpu(name: str) -> None:
    def activation(device: str) -> object:
        if name in ACTIVATIONS:
            return ACTIVATIONS[name]
        return XIELU(torch.tensor([0.8], device=device), torch.tensor([0.8], device=device))

    on_cpu, on_gpu = (fitted(activation(device), device) for device in ("cpu", "cuda"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
