"""Sums of activations are those of float64, whatever their mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ffsplit.calibration.sums import CHUNK_TOKENS, NeuronSums
from ffsplit.splitting.scores import centred_output_norm


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, -1e3])
@pytest.mark.parametrize("count", [1, 2, CHUNK_TOKENS, 3 * CHUNK_TOKENS + 5])
def test_sums_are_numpys_in_float64(mean: float, count: int) -> None:
    a_TN = mean + 0.01 * torch.randn(count, 7, generator=torch.Generator().manual_seed(0))
    sums = NeuronSums(torch.eye(7), None)
    sums.add(a_TN)
    (found,), exact = NeuronSums.results([sums]), a_TN.double().numpy()
    np.testing.assert_allclose(found.sum, exact.sum(0), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(found.sum_squares, (exact**2).sum(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.sum_abs, np.abs(exact).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(found.max_abs, np.abs(exact).max(0))
    np.testing.assert_array_equal(found.num_active, (exact > 0).sum(0))


def test_a_small_spread_around_a_large_mean_is_seen() -> None:
    """Raw float32 sums of squares of numbers near 1000 are off by more than a spread of .01 adds to them."""
    spread = torch.tensor([0.01, 0.1, 1.0])
    a_TN = 1000 + spread * torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    sums = NeuronSums(torch.eye(3), None)
    sums.add(a_TN)
    expected = a_TN.double().numpy().std(axis=0)
    np.testing.assert_allclose(centred_output_norm(*NeuronSums.results([sums])), expected, rtol=1e-3)
