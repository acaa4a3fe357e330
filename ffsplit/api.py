"""What Python calls: `ffsplit.compress` and `ffsplit.calibrate`, with keyword arguments and objects.

Keywords are the fields of JobConfig. A model object and a list of texts are saved to a temporary folder
first: a run reads files whatever it was given, and its key depends on their contents alone.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypedDict

from ffsplit.config import Attention, Device, DType, JobConfig
from ffsplit.directories import temporary_root
from ffsplit.errors import ConfigError, GateError, explained
from ffsplit.interrupts import whole_imports
from ffsplit.keys import digest_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ffsplit.progress import Progress
    from ffsplit.store.manifest import Manifest

Given = ParamSpec("Given")
Where = str | os.PathLike[str]
COLUMN, TEXT_FILE = "text", "texts-{digest}.jsonl"
SOURCE_PREFIXES = ("builtin:", "self:", "hf:")


class JobFields(TypedDict, total=False):
    """JobConfig's fields, as Python callers may write them.

    `model` may be a transformers model, or a SentenceTransformer. In `calibration` a string is a source and a
    tuple several of them; a list, or a column of a `datasets.Dataset`, holds the texts themselves.
    """

    model: Any
    out: Where
    recipe: Where
    keep: float | str
    max_bytes: int | str
    max_parameters: int
    max_latency_ms: float
    width_multiple: int
    latency_table: Where
    stats: Where
    calibration: Where | Sequence[str] | Any
    eval: str | Sequence[str]
    gate: str | Sequence[str]
    require_speedup: float
    mlflow: str
    plain: bool
    only: str | Sequence[str]
    skip: str | Sequence[str]
    samples: int
    max_length: int
    workers: int
    gpus_per_worker: float
    accelerator_type: str
    threads_per_worker: int
    healing_threads: int
    healing_workers: int
    device: Device
    dtype: DType
    address: str
    runner: Literal["ray", "serial"]
    revision: str
    seed: int
    block_by_block: bool
    memory_per_worker: int | str
    attn_implementation: Attention
    trust_remote_code: bool
    fresh: bool


def _showing_fields(function: Callable[Given, Manifest]) -> Callable[Given, Manifest]:
    """Show JobConfig's fields in the function's signature, so that notebooks complete them."""
    *own, _ = inspect.signature(function).parameters.values()
    named = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation
        )
        for name, field in JobConfig.model_fields.items()
    ]
    function.__signature__ = inspect.Signature([own[0], *named, *own[1:]])  # type: ignore[attr-defined]
    return function


@_showing_fields
def compress(
    config: JobConfig | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    sign_key: Path | None = None,
    **fields: Unpack[JobFields],
) -> Manifest:
    """Calibrate, split, compress, measure and publish. Returns the committed manifest.

        ffsplit.compress(model="path/to/model", out="out/mine", keep=0.5, calibration=["A text.", "Another."])

    Takes a JobConfig or its fields. A model object needs its `tokenizer`, or its processor. A run whose key
    is committed already is not run again. Raises ConfigError for a mistake of the caller's, before anything
    is written, GateError for a result that does not pass its gates, and other FFSplitErrors for failures
    while running. Finished work then stays in the scratch, and the next call for the same result resumes
    from it. `sign_key` is a private key to sign the manifest with; it is not recorded anywhere.
    """
    with whole_imports(), _job(config, tokenizer, dict(fields)) as job:
        from ffsplit.measurement.gates import refusal
        from ffsplit.run.driver import run_to_end

        finished = run_to_end(job, progress=progress, sign_key=sign_key)
    if finished.state == "refused":
        raise GateError(refusal(finished.manifest.gates) or "refused")
    return finished.manifest


@_showing_fields
def calibrate(
    config: JobConfig | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    sign_key: Path | None = None,
    **fields: Unpack[JobFields],
) -> Manifest:
    """Collect and publish neuron statistics alone; `latest` never moves to them.

    Arguments are those of `compress`.
    """
    with whole_imports(), _job(config, tokenizer, dict(fields)) as job:
        from ffsplit.run.driver import run_to_end

        return run_to_end(job, kind="statistics", progress=progress, sign_key=sign_key).manifest


@contextmanager
def _job(config: JobConfig | None, tokenizer: Any, fields: dict[str, Any]) -> Iterator[JobConfig]:
    """The job that the arguments describe. What is in memory is in files while it lasts."""
    if config is not None:
        if fields or tokenizer is not None:
            names = ", ".join([*fields, *(["tokenizer"] if tokenizer is not None else [])])
            raise ConfigError(f"give a JobConfig or its fields, not both: {names}")
        if not isinstance(config, JobConfig):
            raise ConfigError(
                f"give a JobConfig, or fields by name such as model=..., not {type(config).__name__}"
            )
        yield config
        return
    model, calibration = fields.get("model"), fields.get("calibration")
    has_model = model is not None and not isinstance(model, str | os.PathLike)
    if tokenizer is not None and not has_model:
        raise ConfigError("tokenizer is for a model object: a model in a folder has its own")
    texts = None if calibration is None else _texts_in(calibration)
    with TemporaryDirectory(prefix="ffsplit-given-", dir=temporary_root()) as name:
        if has_model:
            fields["model"] = str(_save_model(model, tokenizer, Path(name)))
        if texts is not None:
            fields["calibration"] = (_save_texts(texts, Path(name)),)
        yield JobConfig(**fields)


def _texts_in(calibration: Any) -> list[str] | None:
    """The texts, or None if what was given names sources."""
    if isinstance(calibration, str | os.PathLike | tuple):
        return None
    if hasattr(calibration, "column_names"):
        raise ConfigError(
            f"calibration: give one column of the dataset, such as dataset[{COLUMN!r}]; it has "
            f"{', '.join(map(repr, calibration.column_names or ()))}"
        )
    with explained("calibration cannot be read as texts"):
        texts = list(calibration)
    if wrong := [each for each in texts if not isinstance(each, str)]:
        raise ConfigError(f"calibration: every text must be a string, not {type(wrong[0]).__name__}")
    if not texts:
        raise ConfigError("calibration: the list holds no text")
    if all(_names_a_source(text) for text in texts):
        raise ConfigError(
            f"calibration: {texts[0]!r} is a source, not a text: give a string, or a tuple of several"
        )
    return texts


def _names_a_source(text: str) -> bool:
    path = text.partition("#")[0]
    return text.startswith(SOURCE_PREFIXES) or (
        len(path) < 1024 and "\n" not in path and Path(path).is_file()
    )


def _save_texts(texts: Sequence[str], folder: Path) -> str:
    """The texts as a source."""
    path = folder / TEXT_FILE.format(digest=digest_of({COLUMN: list(texts)})[:12])
    lines = (json.dumps({COLUMN: text}, ensure_ascii=False) for text in texts)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return f"{path}#{COLUMN}"


def _save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """A folder with the model and its tokenizer, named after the model."""
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(
            "model must be a path, a hub id or a transformers model with its tokenizer, not "
            f"{type(model).__name__}"
        )
    if tokenizer is None and not hasattr(model, "tokenizer"):
        raise ConfigError(
            "a model object needs its tokenizer: compress(model=model, tokenizer=tokenizer, ...)"
        )
    config = getattr(model, "config", None)
    name = Path(getattr(config, "_name_or_path", "") or "").name or getattr(config, "model_type", "model")
    target = folder / "model" / name  # apart from the texts, which must not be published with it
    with explained("the model cannot be saved"):
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    return target
