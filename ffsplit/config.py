"""What a run is asked to do."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ffsplit.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]
"""The attention kernels that need torch alone, by transformers' names."""


class Record(BaseModel):
    """A frozen pydantic model that refuses fields it does not know.

    One that is read from a store may have more fields than its class (`artifacts/schema.py`): they are
    written back with the rest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _with_unknown_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        known: dict[str, Any] = serialize(self)
        return known | (self.__pydantic_extra__ or {})


BudgetKind = Literal["keep", "max_bytes", "max_parameters", "max_latency_ms"]
BUDGET_KINDS: tuple[BudgetKind, ...] = ("keep", "max_bytes", "max_parameters", "max_latency_ms")


class Budget(Record):
    """What a compressed model may take: a fraction of the FFN elements, the FFNs' bytes, the whole
    model's parameters, or the milliseconds of a forward pass."""

    kind: BudgetKind
    limit: int | float = Field(gt=0)

    def __str__(self) -> str:
        return f"{flag_of(self.kind)} {self.limit:.12g}"


def flag_of(field: str) -> str:
    """The command-line flag of a field."""
    return "--" + field.replace("_", "-")


class JobConfig(Record):
    """One compression run. Fields carry the names of the command-line flags.

    `samples` and `max_length` left at None take the recipe's own value, and so does a job without
    any budget. With `stats`, the earlier run's calibration, samples, max_length and seed take the
    place of those that are not given.
    """

    model: str = Field(min_length=1, description="a local directory or a hub id")
    out: str = Field(min_length=1, description="a directory or s3://bucket/prefix")
    recipe: str = Field(default="fast", description="a shipped recipe's name or a YAML file")
    keep: float | None = Field(default=None, gt=0, le=1, description="FFN elements kept, as a fraction")
    max_bytes: int | None = Field(default=None, ge=1, description="bytes of all FFNs, at most")
    max_parameters: int | None = Field(default=None, ge=1, description="parameters of the model, at most")
    max_latency_ms: float | None = Field(default=None, gt=0, description="of a forward pass, at most")
    latency_table: str | None = Field(default=None, description="what `ffsplit latency-table` wrote")
    stats: str | None = Field(default=None, description="an earlier run whose neuron statistics serve again")
    calibration: tuple[str, ...] = Field(default=("builtin:pydoc",), min_length=1)
    eval: tuple[str, ...] = Field(default=(), description="tasks to score both models on")
    gate: tuple[str, ...] = Field(default=(), description="what the result must measure to be published")
    require_speedup: float | None = Field(default=None, gt=0, description="a gate on every timed shape")
    samples: int | None = Field(default=None, ge=1, description="calibration rows")
    max_length: int | None = Field(default=None, ge=1, description="tokens a row is cut to")
    revision: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    workers: int | None = Field(default=None, ge=1, description="default: one per CPU core")
    gpus_per_worker: float = Field(default=0.0, ge=0)
    threads_per_worker: int = Field(default=1, ge=1)
    healing_threads: int | None = Field(default=None, ge=1, description="default: one per CPU core, in all")
    healing_workers: int = Field(default=1, ge=1, description="that share every step of healing")
    device: Device = "auto"
    dtype: DType = "auto"
    address: str | None = Field(default=None, description="a Ray cluster; default: one started on the spot")
    runner: Literal["ray", "serial"] = "ray"
    attn_implementation: Attention | None = Field(
        default=None, description="attention to run the model with; default: what its config names"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    block_by_block: bool = Field(default=False, description="hold one block of the model at a time")
    plain: bool = Field(default=False, description="refuse a recipe whose result needs ffsplit to load")
    memory_per_worker: int | None = Field(
        default=None, ge=1, description="bytes one worker may use; default: its share of this machine's"
    )
    fresh: bool = Field(default=False, description="run again even when this run key is published")

    @model_validator(mode="after")
    def _has_one_budget(self) -> JobConfig:
        given = [flag_of(kind) for kind in BUDGET_KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are {len(given)} budgets: give one")
        if self.max_latency_ms is not None and self.latency_table is None:
            raise ValueError(
                "--max-latency-ms needs --latency-table FILE, which ffsplit latency-table MODEL measures"
            )
        if self.max_latency_ms is None and self.latency_table is not None:
            raise ValueError("--latency-table is for --max-latency-ms, which is not given")
        return self

    def inheriting(
        self, *, calibration: tuple[str, ...], seed: int, samples: int | None, max_length: int | None
    ) -> JobConfig:
        """This job, with these values for the fields that it was not given."""
        lent = {"calibration": calibration, "seed": seed, "samples": samples, "max_length": max_length}
        return self.model_copy(update={name: each for name, each in lent.items() if not self.has(name)})

    def has(self, field: str) -> bool:
        """Whether a field was given a value."""
        return field in self.model_fields_set and getattr(self, field) is not None

    @property
    def budget(self) -> Budget | None:
        """The budget given, None where the recipe's `keep` is to be taken."""
        for kind in BUDGET_KINDS:
            limit = getattr(self, kind)
            if limit is not None:
                return Budget(kind=kind, limit=limit)
        return None

    @classmethod
    def checked(cls, **fields: Any) -> JobConfig:
        """Build a config, turning pydantic's report into one clear ConfigError."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error)) from None


def describe_validation_error(error: ValidationError, prefix: str = "--") -> str:
    """The first complaint of pydantic as one line that names the field as the user wrote it."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    flag = prefix + path.replace("_", "-") if prefix == "--" else prefix + path
    given = "" if first["type"] == "missing" else f", not {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:
        return message
    return f"{flag} {message}{given}"


# Sizes and spans of time as people write them.

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", re.IGNORECASE | re.ASCII)
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_SPAN_DAYS = 36500


def parse_size(text: str, *, name: str) -> int:
    """Bytes in a size such as 500MB, 50GB or 1.5T. Raises ConfigError, in which `name` says where it was."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ConfigError(f"{name} {text}: give a size such as 500MB or 50GB")
    return int(float(match[1]) * _BYTES[match[2].upper()])


def parse_span(text: str, *, name: str) -> timedelta:
    """A span such as 90s, 30m, 12h or 7d. Raises ConfigError, in which `name` says where it was."""
    match = _SPAN.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else -1
    if not 0 <= seconds <= _MAX_SPAN_DAYS * 86400:
        raise ConfigError(f"{name} {text}: give a time such as 90s, 30m, 12h or 7d")
    return timedelta(seconds=seconds)
