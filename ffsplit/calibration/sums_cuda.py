"""Sums of neuron activations on a GPU: one kernel per FFN and batch, which reads every activation once.

A tile of rows is summed in float32 around its own mean, and the tiles in float64, as on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_TOKENS, TILE_NEURONS = 128, 64


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def add_sums(  # type: ignore[no-untyped-def]
    activations, rows, totals, num_tokens, num_neurons, stride,
    HAS_ROWS: tl.constexpr, TOKENS: tl.constexpr, NEURONS: tl.constexpr,
):  # fmt: skip
    """Add a batch to `totals` [groups, 5, N], float64: a program per group of tiles and NEURONS neurons.

    The five are the sums of |a|, a and a², the number of a > 0, and the largest |a|. Each program owns its
    part of the totals, so the order of the sums is fixed. With HAS_ROWS, token t is row `rows[t]` of the
    activations. `stride` is the number of elements between rows.
    """
    neurons = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    is_neuron = neurons < num_neurons
    sum_abs = tl.zeros([NEURONS], tl.float64)
    total = tl.zeros([NEURONS], tl.float64)
    sum_squares = tl.zeros([NEURONS], tl.float64)
    num_active = tl.zeros([NEURONS], tl.float64)
    largest = tl.zeros([NEURONS], tl.float32)
    for start in range(group * TOKENS, num_tokens, num_groups * TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        is_token = tokens < num_tokens
        if HAS_ROWS:  # noqa: SIM108
            places = tl.load(rows + tokens, mask=is_token, other=0)
        else:
            places = tokens.to(tl.int64)
        is_in = is_token[:, None] & is_neuron[None, :]
        tile = tl.load(activations + places[:, None] * stride + neurons[None, :], mask=is_in, other=0.0)
        tile = tile.to(tl.float32)
        size = tl.minimum(num_tokens - start, TOKENS).to(tl.float32)
        centre = tl.sum(tile, 0) / size
        spread = tl.where(is_in, tile - centre[None, :], 0.0)
        beyond = tl.sum(spread, 0).to(tl.float64)
        squares = tl.sum(spread * spread, 0).to(tl.float64)
        absolute = tl.abs(tile)
        sum_abs += tl.sum(absolute, 0).to(tl.float64)
        largest = tl.maximum(largest, tl.max(absolute, 0))
        num_active += tl.sum((tile > 0).to(tl.float32), 0).to(tl.float64)
        middle = centre.to(tl.float64)
        of_tile = middle * size.to(tl.float64) + beyond
        total += of_tile
        sum_squares += squares + middle * (of_tile + beyond)
    place = totals + group.to(tl.int64) * 5 * num_neurons + neurons
    tl.store(place, tl.load(place, mask=is_neuron) + sum_abs, mask=is_neuron)
    place += num_neurons
    tl.store(place, tl.load(place, mask=is_neuron) + total, mask=is_neuron)
    place += num_neurons
    tl.store(place, tl.load(place, mask=is_neuron) + sum_squares, mask=is_neuron)
    place += num_neurons
    tl.store(place, tl.load(place, mask=is_neuron) + num_active, mask=is_neuron)
    place += num_neurons
    before = tl.load(place, mask=is_neuron)
    tl.store(place, tl.maximum(before, largest.to(tl.float64)), mask=is_neuron)
