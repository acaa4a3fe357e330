"""The GPU's kernel sums what the CPU's code sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ffsplit.calibration.sums import NeuronSums, kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize(("count", "size"), [(1, 7), (129, 64), (5000, 1536), (16384, 130)])
@pytest.mark.parametrize("expert", [None, 3])
def test_sums_are_numpys_in_float64(
    dtype: torch.dtype, mean: float, count: int, size: int, expert: int | None
) -> None:
    assert kernel() is not None
    a_TN = (mean + torch.randn(count, size, generator=torch.Generator().manual_seed(0))).to(dtype)
    rows = torch.arange(0, count, 3)
    sums = NeuronSums(torch.eye(size, device="cuda"), expert)
    sums.add(a_TN.cuda())
    sums.add(a_TN.cuda(), rows=rows.cuda())
    (found,) = NeuronSums.results([sums])
    exact = torch.cat([a_TN, a_TN[rows]]).double().numpy()
    assert found.num_tokens == len(exact)
    np.testing.assert_allclose(found.sum, exact.sum(0), rtol=1e-6, atol=1e-5 * len(exact) ** 0.5)
    np.testing.assert_allclose(found.sum_squares, (exact**2).sum(0), rtol=1e-6)
    np.testing.assert_allclose(found.sum_abs, np.abs(exact).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(found.max_abs, np.abs(exact).max(0))
    np.testing.assert_array_equal(found.num_active, (exact > 0).sum(0))


def test_an_activation_that_is_not_finite_is_seen() -> None:
    a_TN = torch.ones(300, 8, device="cuda")
    a_TN[7, 5] = torch.inf
    sums = NeuronSums(torch.eye(8, device="cuda"), None)
    sums.add(a_TN)
    (found,) = NeuronSums.results([sums])
    assert np.isfinite(found.sum_squares).tolist() == [True] * 5 + [False] + [True] * 2
