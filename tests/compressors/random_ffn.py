"""Random dense FFNs of every form, and inputs to run them on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.ffn.shapes import FFNShape
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap

FORMS = {
    f"{'gated' if gated else 'plain'}{'-biased' if biased else ''}": FFNShape(
        num_neurons=48, hidden_size=16, gated=gated, up_bias=biased, down_bias=biased
    )
    for gated in (False, True)
    for biased in (False, True)
}


def random_ffn(shape: FFNShape, *, seed: int = 0) -> FFNWeights:
    """A dense FFN in float32 whose neurons differ in size, as a trained one's do."""
    generator = torch.Generator().manual_seed(seed)
    n, d = shape.num_neurons, shape.hidden_size

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def into_neurons() -> LinearMap:
        return LinearMap.dense(normal(n, d) / d**0.5, normal(n) * 0.3 if shape.up_bias else None)

    up, gate = into_neurons(), into_neurons() if shape.gated else None
    down = LinearMap.dense(normal(d, n) * normal(n).exp() / n**0.5)
    part = FFNPart(torch.arange(n), up, gate, down)
    return FFNWeights(part, None, normal(d) if shape.down_bias else None, functional.gelu)


def random_inputs(hidden_size: int, *, sizes: tuple[int, ...] = (300, 200), seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, hidden_size, generator=generator) for size in sizes]


def direct_output(ffn: FFNWeights, x_TD: Tensor) -> Tensor:
    """A dense FFN's output by its definition, a sum over neurons, in float64."""
    assert ffn.heavy is not None and ffn.light is None
    x = x_TD.double()

    def linear(each: LinearMap) -> Tensor:
        bias = 0 if each.bias is None else each.bias.double()
        return torch.einsum("td,nd->tn", x, each.tensors["weight"].double()) + bias

    hidden = linear(ffn.heavy.up)
    if ffn.heavy.gate is None:
        hidden = functional.gelu(hidden)
    else:
        hidden = functional.gelu(linear(ffn.heavy.gate)) * hidden
    output = torch.einsum("tn,dn->td", hidden, ffn.heavy.down.tensors["weight"].double())
    return output if ffn.down_bias is None else output + ffn.down_bias.double()


def all_tensors(ffn: FFNWeights) -> list[Tensor]:
    """Every tensor of an FFN but the neurons' indices, in a fixed order."""
    tensors: list[Tensor] = []
    for part in ffn.parts:
        for linear in (part.up, part.gate, part.down):
            if linear is not None:
                tensors += [linear.tensors[name] for name in sorted(linear.tensors)]
                tensors += [] if linear.bias is None else [linear.bias]
    return tensors + ([] if ffn.down_bias is None else [ffn.down_bias])
