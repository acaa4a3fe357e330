"""What this machine can compute with."""

from __future__ import annotations

import timeit

import pytest
import torch

from ffsplit.errors import ConfigError
from ffsplit.machine import check_device, computes_in, multiplies_bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_processor_computes_in_the_dtypes_that_are_offered(dtype: str) -> None:
    assert computes_in("cpu", dtype)


def test_a_dtype_without_products_is_refused() -> None:
    """torch multiplies no matrices of bare exponents."""
    with pytest.raises(ConfigError, match="--dtype float8_e8m0fnu: this machine's CPU"):
        check_device("cpu", "float8_e8m0fnu")


def test_what_multiplies_bfloat16_is_faster_at_it() -> None:
    """Where the processor has instructions for it, which is less sure the other way round."""
    if not multiplies_bfloat16("cpu"):
        pytest.skip("this processor has no instructions for bfloat16")
    a = torch.ones(768, 768)
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        b = a.to(dtype)
        times[dtype] = min(timeit.repeat(lambda b=b: b @ b, number=1, repeat=9))
    assert times[torch.bfloat16] < times[torch.float32]
