from datetime import timedelta

import pytest

from ffsplit.config import parse_size, parse_span
from ffsplit.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("5", 5), ("500MB", 5 * 10**8), ("1.5 g", 15 * 10**8), ("2T", 2 * 10**12)]
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text, name="--size") == size_bytes


@pytest.mark.parametrize("text", ["", "-1", "much", "1 GiB", "1e9", "\u0661GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--size"):
        parse_size(text, name="--size")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), (" 7 D", 604800), ("0s", 0)])
def test_spans(text: str, seconds: int) -> None:
    assert parse_span(text, name="--expires") == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5", "-1h", "1w", "soon", "1e9d", "9" * 400 + "d"])
def test_no_spans(text: str) -> None:
    with pytest.raises(ConfigError, match="--expires"):
        parse_span(text, name="--expires")
