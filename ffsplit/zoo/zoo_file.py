"""The zoo file (YAML): which models to compress, how, and the gates they must meet."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from ffsplit.config import BUDGET_KINDS, JobConfig, Record, describe_validation_error
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError, did_you_mean, reason_of
from ffsplit.keys import digest_of
from ffsplit.measurement.gates import parse_gates
from ffsplit.measurement.regressions import RegressionGate, is_regression, parse_regression
from ffsplit.store.aliases import check_alias
from ffsplit.zoo.events import Hook

PLACES = ("out", "address", "runner", "fresh")
"""Fields of a job that the batch sets, not the file."""
JOB_FIELDS = tuple(name for name in JobConfig.model_fields if name not in PLACES)
RESERVED_NAMES = ("batches", "index.html")
"""Names that a batch itself writes to the destination."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ZooModel(Record):
    """One model of a zoo: its name and its job, which publishes to <destination>/<name>."""

    name: str
    job: JobConfig
    regressions: tuple[RegressionGate, ...] = ()


class ZooFile(Record):
    """A zoo file's own fields. The fields of `defaults` and of each model are flags of `ffsplit compress`."""

    destination: str = Field(min_length=1, description="a directory or s3://bucket/prefix")
    promote: str | None = Field(default=None, description="the alias of what is in use, such as production")
    prices: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="per hour: of a GPU, by a part of its name, and of a core, as CPU"
    )
    on_event: Hook | None = Field(default=None, description="what to call when something happens")
    max_models_in_flight: int = Field(default=2, ge=1, le=1000)
    retries: int = Field(default=2, ge=0, le=20, description="of a model that fails while running")
    backoff_s: float = Field(
        default=30.0, ge=0, le=3600, description="before the first retry; doubled each time"
    )
    attempt_hours: float = Field(default=168.0, gt=0, description="limit per attempt")
    defaults: dict[str, Any] = Field(default={}, description="fields of every model")
    models: list[dict[str, Any]] = Field(min_length=1)


class Zoo(Record):
    """A zoo file, read and checked."""

    name: str
    destination: str
    promote: str | None
    prices: dict[str, float]
    on_event: Hook | None
    max_models_in_flight: int
    retries: int
    backoff_s: float
    attempt_hours: float
    models: tuple[ZooModel, ...]

    @property
    def digest(self) -> str:
        """sha256 of what the file asks for, independent of its formatting, of prices and of hooks."""
        return digest_of(self.model_dump(mode="json", exclude={"name", "prices", "on_event"}))


def load_zoo(path: str) -> Zoo:
    """Read a zoo file. Raises ConfigError in one line: problem, place, and the closest valid name."""
    file = user_path(path)
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"zoo file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"zoo file {path} is not UTF-8 text") from None
    return parse_zoo(text, where=path, name=file.stem)


def parse_zoo(text: str, *, where: str, name: str) -> Zoo:
    """The zoo of a YAML text. Every error message begins with `where`."""
    fields = _read_yaml(text, where=where)
    _check_names(fields, known=tuple(ZooFile.model_fields), where=where)
    try:
        file = ZooFile.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}") from None
    _check_names(file.defaults, known=JOB_FIELDS, where=f"{where}: defaults")
    models = tuple(_model(file, index, where=where) for index in range(len(file.models)))
    _check_apart(models, where=where)
    try:
        alias = None if file.promote is None else check_alias(file.promote)
    except ConfigError as error:
        raise ConfigError(f"{where}: promote: {error}") from None
    return Zoo(
        name=name,
        destination=file.destination.rstrip("/"),
        promote=alias,
        prices=file.prices,
        on_event=file.on_event,
        max_models_in_flight=file.max_models_in_flight,
        retries=file.retries,
        backoff_s=file.backoff_s,
        attempt_hours=file.attempt_hours,
        models=models,
    )


def _check_apart(models: Sequence[ZooModel], *, where: str) -> None:
    """Raise ConfigError if two models would publish to the same path. Some stores ignore case."""
    seen: dict[str, int] = {}
    for index, model in enumerate(models):
        first = seen.setdefault(model.name.lower(), index)
        if first == index:
            continue
        other = models[first].name
        same = "are both named" if other == model.name else f"are named {other!r} and"
        raise ConfigError(
            f"{where}: models[{first}] ({models[first].job.model}) and models[{index}] ({model.job.model}) "
            f"{same} {model.name!r}, and would publish to the same path: give one another `name`"
        )


def _model(file: ZooFile, index: int, *, where: str) -> ZooModel:
    """One entry, with the defaults for fields it does not set."""
    entry = dict(file.models[index])
    entry_name = f"{where}: models[{index}]"
    _check_names(entry, known=("name", *JOB_FIELDS), where=entry_name)
    name = entry.pop("name", None)
    fields = _without_other_budgets(file.defaults, entry) | entry
    if name is None:
        name = Path(str(fields.get("model", ""))).name
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in RESERVED_NAMES:
        raise ConfigError(
            f"{entry_name}: {name!r} is not a valid name: use letters, digits, '.', '_' and '-', but not "
            f"{' or '.join(RESERVED_NAMES)}"
        )
    entry_name = f"{entry_name} ({name})"
    regressions = _regressions(fields, where=entry_name, promotes=file.promote is not None)
    try:
        job = JobConfig(out=f"{file.destination.rstrip('/')}/{name}", **fields)
    except ConfigError as error:
        raise ConfigError(f"{entry_name}: {error}") from None
    try:
        parse_gates(job.gate, require_speedup=job.require_speedup)
    except ConfigError as error:
        raise ConfigError(f"{entry_name}: {str(error).removeprefix('--')}") from None
    return ZooModel(name=name, job=job, regressions=regressions)


def _regressions(fields: dict[str, Any], *, where: str, promotes: bool) -> tuple[RegressionGate, ...]:
    """The gates that compare with the current result. They are taken out of the job's fields."""
    given = fields.get("gate", ())
    gates = [given] if isinstance(given, str) else given
    if not isinstance(gates, list | tuple):
        return ()  # JobConfig reports it
    found = [gate for gate in gates if isinstance(gate, str) and is_regression(gate)]
    if not found:
        return ()
    if not promotes:
        raise ConfigError(
            f"{where}: gate {found[0]!r} needs `promote: production`, which names the current result"
        )
    fields["gate"] = [gate for gate in gates if gate not in found]
    try:
        return tuple(parse_regression(gate) for gate in found)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _without_other_budgets(defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, without their budget if the entry has its own."""
    budget_fields = (*BUDGET_KINDS, "latency_table")
    own = any(entry.get(name) is not None for name in BUDGET_KINDS)
    return {name: value for name, value in defaults.items() if not (own and name in budget_fields)}


def _check_names(fields: Mapping[Any, Any], *, known: Collection[str], where: str) -> None:
    for name in fields:
        if name in known:
            continue
        if name in PLACES:
            raise ConfigError(f"{where}: {name} cannot be set in a zoo file: give `destination`, or a flag")
        hint = did_you_mean(str(name), known) or f" (known: {', '.join(known)})"
        raise ConfigError(f"{where}: unknown field {name}{hint}")


def _read_yaml(text: str, *, where: str) -> dict[Any, Any]:
    try:
        fields = yaml.load(text, Loader=_Loader)
    except Exception as error:  # the parser's errors, and those of values, such as a 30th of February
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or reason_of(error)
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} must be a YAML mapping with the fields {', '.join(ZooFile.model_fields)}")
    return fields


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice. YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if key != "<<" and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)
