"""Latency tables: how long a forward pass takes on one machine, by the width of the FFNs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from ffsplit.config import Record
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import ModelShape

Hardware = dict[str, str | int]


class LatencyPoint(Record):
    """The median time of a whole forward pass with every FFN at this width."""

    width: int = Field(ge=1)
    ms: float = Field(gt=0, allow_inf_nan=False)


class LatencyTable(Record):
    """Forward passes of one model at one shape on one machine.

    Points are as measured, from a narrow width to the model's own; `ms()` never decreases with the width.
    """

    schema_version: Literal[1] = 1
    model: str
    model_shape: ModelShape
    batch_size: int = Field(ge=1)
    num_tokens: int = Field(ge=1, description="tokens per row")
    dtype: str
    num_threads: int
    hardware: Hardware = Field(description="a fingerprint: the table is rejected if it differs")
    points: tuple[LatencyPoint, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _reaches_from_narrow_to_dense(self) -> LatencyTable:
        widths = [point.width for point in self.points]
        if widths != sorted(set(widths)):
            raise ValueError("widths must rise")
        dense = max(shape.num_neurons for shape in self.model_shape.shapes)
        if widths[-1] != dense:
            raise ValueError(f"the widest FFN timed has {widths[-1]:,} neurons, the model's has {dense:,}")
        return self

    @cached_property
    def _monotone(self) -> list[float]:
        """The times, made monotone in the width: neighbours out of order share their mean.

        Source: pool adjacent violators, Ayer et al., 1955; the least-squares monotone fit.
        """
        pools: list[tuple[float, int]] = []
        for point in self.points:
            mean, count = point.ms, 1
            while pools and pools[-1][0] > mean:
                earlier, size = pools.pop()
                mean, count = (earlier * size + mean * count) / (size + count), size + count
            pools.append((mean, count))
        return [mean for mean, count in pools for _ in range(count)]

    def ms(self, width: int) -> float:
        """Milliseconds at a width, by linear interpolation of the monotone fit.

        Below the narrowest timed width, that width's time is used: rather too high than too low.
        """
        widths, times = [point.width for point in self.points], self._monotone
        assert width <= widths[-1], "no FFN is wider than the model's own"
        right = bisect_right(widths, width)
        if right in (0, len(widths)):
            return times[min(right, len(widths) - 1)]
        left = right - 1
        share = (width - widths[left]) / (widths[right] - widths[left])
        return min(times[left] + share * (times[right] - times[left]), times[right])

    def mean_ms(self, widths: Sequence[int]) -> float:
        """The mean over layers of the table's time for each layer's width.

        It is the model's latency if that is a fixed part plus one part per layer. If all layers have one
        width, the result is exactly that width's time, whatever the rounding of the sum.
        """
        times = [self.ms(width) for width in widths]
        return min(max(math.fsum(times) / len(times), min(times)), max(times))


def read_latency_table(
    path: str, *, model: ModelShape, hardware: Mapping[str, str | int], dtype: str
) -> LatencyTable:
    """Read a table for this model, on this machine, in this dtype. Raises ConfigError for any other."""
    again = "measure one here with ffsplit latency-table"
    try:
        table = LatencyTable.model_validate_json(user_path(path).read_bytes(), extra="allow")
    except OSError as error:
        raise ConfigError(f"--latency-table {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--latency-table {path}: {where}{what}: {again}") from None
    for name in sorted({*table.hardware, *hardware}):
        theirs, ours = table.hardware.get(name), hardware.get(name)
        if theirs != ours:
            raise ConfigError(
                f"--latency-table {path} is from another machine ({name} {theirs!r}, here {ours!r}): {again}"
            )
    if table.model_shape != model:
        raise ConfigError(f"--latency-table {path} is of another model, {table.model}: {again}")
    if table.dtype != dtype:
        raise ConfigError(
            f"--latency-table {path} was measured in {table.dtype}, the run computes in {dtype}: "
            "give the same --dtype to both"
        )
    return table
