"""What a run is asked to do."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from datetime import timedelta
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from ffsplit.errors import ConfigError, did_you_mean

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]
"""The attention kernels that need torch alone, by transformers' names."""


class Record(BaseModel):
    """A frozen pydantic model that refuses fields it does not know.

    A record that is read from a store may have more fields than its class (`store/schema.py`). They are
    written back with the others.
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


class Flag(NamedTuple):
    """How the command line takes a field of JobConfig: its METAVAR, and which commands have it."""

    metavar: str = ""
    compress_only: bool = False


def _path_as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _share_as_number(value: Any) -> Any:
    """35% as 0.35."""
    text = value.strip() if isinstance(value, str) else ""
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else value
    except ValueError:
        raise ValueError("must be a number such as 0.35 or 35%") from None


def _size_as_number(value: Any) -> Any:
    """5MB as 5000000."""
    if not isinstance(value, str):
        return value
    if (size := _bytes_of(value)) is None:
        raise ValueError("must be a size such as 500MB or 50GB")
    return size


def _one_as_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_path_as_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_as_several), BeforeValidator(_path_as_text)]
Share = Annotated[float, BeforeValidator(_share_as_number)]
Size = Annotated[int, BeforeValidator(_size_as_number)]


class JobConfig(Record):
    """One compression run. A field with a Flag is an option of the command line, by the same name.

    Fields take what people write: a path for a string, one string for several, `35%`, `5MB`. Every mistake
    raises ConfigError.

    `samples`, `max_length` and the budget default to the recipe's. With `stats`, the calibration, samples,
    max_length and seed that are not given are those of the earlier run.
    """

    model: Text = Field(
        min_length=1, description="a local directory, s3://bucket/prefix, a store of runs or a hub id"
    )
    out: Annotated[Text, Flag("URI")] = Field(min_length=1, description="a directory or s3://bucket/prefix")
    recipe: Annotated[Text, Flag("NAME|FILE.yaml")] = Field(
        default="fast", description="a shipped recipe or a file; default: fast"
    )
    keep: Annotated[Share | None, Flag("F")] = Field(
        default=None,
        gt=0,
        le=1,
        description="fraction of the FFN elements to keep, such as 0.5 or 50%; default: the recipe's, "
        "which is 0.3535 unless it sets another",
    )
    max_bytes: Annotated[Size | None, Flag("SIZE", compress_only=True)] = Field(
        default=None, ge=1, description="instead of --keep: bytes of all FFNs, at most, such as 5MB"
    )
    max_parameters: Annotated[int | None, Flag("N", compress_only=True)] = Field(
        default=None, ge=1, description="instead of --keep: parameters of the whole model, at most"
    )
    max_latency_ms: Annotated[float | None, Flag("F", compress_only=True)] = Field(
        default=None,
        gt=0,
        description="instead of --keep: milliseconds of a forward pass, at most (experimental)",
    )
    width_multiple: Annotated[int | None, Flag("N", compress_only=True)] = Field(
        default=None,
        ge=1,
        description="widths and ranks are multiples of N, such as 128 per GPU of tensor parallelism, or 256 "
        "for llama.cpp; default: the recipe's, or 64 where that costs little",
    )
    latency_table: Annotated[Text | None, Flag("FILE", compress_only=True)] = Field(
        default=None, description="for --max-latency-ms: the file that ffsplit latency-table wrote"
    )
    stats: Annotated[Text | None, Flag("URI", compress_only=True)] = Field(
        default=None, description="an earlier run of this model, whose statistics are reused"
    )
    calibration: Annotated[Texts, Flag("SPEC")] = Field(
        default=("builtin:text",),
        min_length=1,
        description="file.txt, file.jsonl#field, file.csv#column, file.tsv#column, file.parquet#column, "
        "hf:dataset[:config]#column@split, builtin:text (the default) or builtin:pydoc; self:4M is that many "
        "tokens that a causal language model writes itself; may be repeated, with shares: file.txt:0.5. "
        "Pictures, sound and videos, alone or with texts (experimental): docs/calibration-text.md",
    )
    eval: Annotated[Texts, Flag("SPEC", compress_only=True)] = Field(
        default=(),
        description="score both models: sts:file.csv[#first,second,score], "
        "classification:file.tsv[#text,label], perplexity:file.txt or lm-eval:task[,task] "
        "(experimental); may be repeated",
    )
    gate: Annotated[Texts, Flag("SPEC", compress_only=True)] = Field(
        default=(),
        description="publish only a result with, for example, 'fidelity >= 0.98', 'sts drop <= 0.5', "
        "'speedup@8x128 >= 1.3' or 'size reduction >= 20%'; may be repeated",
    )
    require_speedup: Annotated[float | None, Flag("F", compress_only=True)] = Field(
        default=None, gt=0, description="publish only if the speed-up is at least F at every timed shape"
    )
    plain: Annotated[bool, Flag(compress_only=True)] = Field(
        default=False, description="refuse a recipe whose result would need ffsplit to load"
    )
    only: Annotated[Texts, Flag("PATTERN")] = Field(
        default=(),
        description="compress only FFNs whose name matches, such as 'decoder*' or 'layer 1?'; may be "
        "repeated. A pattern that matches nothing lists the names",
    )
    skip: Annotated[Texts, Flag("PATTERN")] = Field(
        default=(), description="leave FFNs as they are whose name matches; may be repeated"
    )
    samples: Annotated[int | None, Flag("N")] = Field(
        default=None, ge=1, description="rows of calibration text; default: the recipe's"
    )
    max_length: Annotated[int | None, Flag("N")] = Field(
        default=None, ge=1, description="tokens per row; longer rows are cut; default: the recipe's"
    )
    workers: Annotated[int | None, Flag("N")] = Field(
        default=None, ge=1, description="default: one per CPU core of the cluster"
    )
    gpus_per_worker: Annotated[float, Flag("F")] = Field(
        default=0.0, ge=0, description="below 1, workers share a GPU; above 1 it must be a whole number"
    )
    accelerator_type: Annotated[str | None, Flag("NAME")] = Field(
        default=None,
        min_length=1,
        description="use only nodes whose label ray.io/accelerator-type is NAME, such as H100; default: all "
        "nodes, but those with one kind of GPU alone for timings",
    )
    threads_per_worker: Annotated[int, Flag("N")] = Field(
        default=1, ge=1, description="CPU threads of each worker; default: 1"
    )
    healing_threads: Annotated[int | None, Flag("N", compress_only=True)] = Field(
        default=None, ge=1, description="CPU threads of each healing worker; default: all cores, shared out"
    )
    healing_workers: Annotated[int, Flag("N", compress_only=True)] = Field(
        default=1,
        ge=1,
        description="workers that share every healing step, by Ray Train; default: 1. Experimental on GPUs",
    )
    device: Annotated[Device, Flag()] = Field(default="auto", description="default: auto")
    dtype: Annotated[DType, Flag()] = Field(default="auto", description="to compute in; default: auto")
    address: Annotated[str | None, Flag("RAY")] = Field(
        default=None, description="a Ray cluster; default: RAY_ADDRESS, or a new local cluster"
    )
    runner: Annotated[Literal["ray", "serial"], Flag()] = Field(default="ray", description="default: ray")
    revision: Annotated[str | None, Flag("R")] = Field(
        default=None, description="branch, tag or commit of a hub id; default: main"
    )
    seed: Annotated[int, Flag("N")] = Field(default=0, ge=0, lt=2**32, description="default: 0")
    block_by_block: Annotated[bool, Flag()] = Field(
        default=False,
        description="hold one block of the model in memory at a time; default: if the model does not fit",
    )
    memory_per_worker: Annotated[Size | None, Flag("SIZE")] = Field(
        default=None, ge=1, description="such as 6GB; default: a worker's share of this machine's memory"
    )
    attn_implementation: Annotated[Attention | None, Flag()] = Field(
        default=None, description="attention kernel for the model; default: the config's own"
    )
    trust_remote_code: Annotated[bool, Flag()] = Field(
        default=False, description="run code that comes with the model; read it first"
    )
    mlflow: Annotated[str | None, Flag("URI", compress_only=True)] = Field(
        default=None, description="log the run to this MLflow tracking server too, as in http://host:5000"
    )
    fresh: Annotated[bool, Flag()] = Field(
        default=False, description="run again even if this run is committed already"
    )

    @model_validator(mode="after")
    def _has_one_budget(self, info: ValidationInfo) -> JobConfig:
        prefix = _prefix_of(info)
        given = [_as_written(kind, prefix) for kind in BUDGET_KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are {len(given)} budgets: give one")
        if self.max_latency_ms is not None and self.latency_table is None:
            raise ValueError(
                "--max-latency-ms needs --latency-table FILE, which ffsplit latency-table MODEL measures"
            )
        if self.max_latency_ms is None and self.latency_table is not None:
            raise ValueError("--latency-table is for --max-latency-ms, which is not given")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_errors(
        cls, fields: Any, validate: ModelWrapValidatorHandler[JobConfig], info: ValidationInfo
    ) -> JobConfig:
        try:
            return validate(fields)
        except ValidationError as error:
            message = describe_validation_error(error, prefix=_prefix_of(info), known=cls.model_fields)
            raise ConfigError(message) from None

    def inheriting(
        self, *, calibration: tuple[str, ...], seed: int, samples: int | None, max_length: int | None
    ) -> JobConfig:
        """This job, with these values for fields that were not given."""
        lent = {"calibration": calibration, "seed": seed, "samples": samples, "max_length": max_length}
        return self.model_copy(update={name: each for name, each in lent.items() if not self.has(name)})

    def has(self, field: str) -> bool:
        """Whether a field was given a value."""
        return field in self.model_fields_set and getattr(self, field) is not None

    @property
    def budget(self) -> Budget | None:
        """The given budget; None means the recipe's `keep`."""
        for kind in BUDGET_KINDS:
            limit = getattr(self, kind)
            if limit is not None:
                return Budget(kind=kind, limit=limit)
        return None

    @classmethod
    def of_flags(cls, **fields: Any) -> JobConfig:
        """A config from the command line. Errors name flags rather than fields."""
        return cls.model_validate(fields, context={"prefix": FLAG_PREFIX})


FLAG_PREFIX = "--"
_NUMBER = re.compile(r"[-+]?[\d.]+%?")


def _prefix_of(info: ValidationInfo) -> str:
    return FLAG_PREFIX if info.context and info.context.get("prefix") == FLAG_PREFIX else ""


def _as_written(field: str, prefix: str) -> str:
    return flag_of(field) if prefix == FLAG_PREFIX else prefix + field


def describe_validation_error(
    error: ValidationError, *, prefix: str = "", known: Collection[str] = ()
) -> str:
    """pydantic's first error as one line, with the field's name as the user wrote it.

    An unknown field is told with the closest of the `known` ones.
    """
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = [_as_written(name, prefix) for name in (path, *known)]
        return f"unknown field {names[0]}{did_you_mean(names[0], names[1:])}"
    if first["type"] == "missing":
        return f"{_as_written(path, prefix)} is missing"
    if first["type"] in ("too_short", "string_too_short") and not first["input"]:
        return f"{_as_written(path, prefix)} must not be empty"
    written = first["input"]
    is_number = isinstance(written, str) and _NUMBER.fullmatch(written)  # from the command line
    given = f", not {written if is_number else repr(written)}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:
        return message
    return f"{_as_written(path, prefix)} {message}{given}"


# Sizes and spans of time as people write them.

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", re.IGNORECASE | re.ASCII)
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_SPAN_DAYS = 36500


def _bytes_of(text: str) -> int | None:
    match = _SIZE.fullmatch(text)
    return int(float(match[1]) * _BYTES[match[2].upper()]) if match else None


def parse_size(text: str, *, name: str) -> int:
    """Bytes in a size such as 500MB, 50GB or 1.5T. Raises ConfigError, which names the flag `name`."""
    if (size := _bytes_of(text)) is None:
        raise ConfigError(f"{name} {text}: give a size such as 500MB or 50GB")
    return size


def parse_span(text: str, *, name: str) -> timedelta:
    """A time span such as 90s, 30m, 12h or 7d. Raises ConfigError, which names the flag `name`."""
    match = _SPAN.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else -1
    if not 0 <= seconds <= _MAX_SPAN_DAYS * 86400:
        raise ConfigError(f"{name} {text}: give a time such as 90s, 30m, 12h or 7d")
    return timedelta(seconds=seconds)
