"""What this machine can compute with."""

from __future__ import annotations

import pytest

from ffsplit.errors import ConfigError
from ffsplit.machine import check_device, computes_in


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_processor_computes_in_the_dtypes_that_are_offered(dtype: str) -> None:
    assert computes_in("cpu", dtype)


def test_a_dtype_without_products_is_refused() -> None:
    """torch multiplies no matrices of bare exponents."""
    with pytest.raises(ConfigError, match="--dtype float8_e8m0fnu: this machine's CPU"):
        check_device("cpu", "float8_e8m0fnu")
