"""Which engines multiply by matrices of some width at their best.

Facts of the engines: int8 tensor cores take rows of a multiple of 16 bytes. vLLM gives each GPU an equal
share of the neurons, and its kernels for quantized weights take multiples of 128 ("min_thread_k = 128");
weights in floating point need only an equal share. llama.cpp's k-quants have blocks of 256 weights along the
input, which is the FFN's width for the down projection; other rows get a larger format instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ffsplit.ffn.shapes import LayerLayout, LowRank

INT8_UNIT, VLLM_UNIT, K_QUANT_UNIT = 16, 128, 256
VLLM_GPUS = (1, 2, 4)


class Suits(NamedTuple):
    """What FFNs of some layouts suit."""

    int8_tensor_cores: bool
    vllm_gpus: tuple[int, ...]
    """The sizes of tensor parallelism that leave each GPU a multiple of 128 neurons."""
    k_quants: bool


def suited(layouts: Sequence[LayerLayout]) -> Suits:
    """What all widths and ranks of these layouts suit."""
    parts = [part for layout in layouts for part in layout.parts]
    widths = [part.num_neurons for part in parts]
    ranks = [format.rank for part in parts for format in part.formats if isinstance(format, LowRank)]
    return Suits(
        int8_tensor_cores=_all_multiples([*widths, *ranks], of=INT8_UNIT),
        vllm_gpus=tuple(num for num in VLLM_GPUS if _all_multiples(widths, of=num * VLLM_UNIT)),
        k_quants=_all_multiples(widths, of=K_QUANT_UNIT),
    )


def _all_multiples(sizes: Sequence[int], *, of: int) -> bool:
    return all(size % of == 0 for size in sizes)
