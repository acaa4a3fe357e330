"""How models are loaded in this process: whether their own code may run, and with which attention kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffsplit.errors import ConfigError

if TYPE_CHECKING:
    from ffsplit.config import Attention


_trusts: ContextVar[bool] = ContextVar("trusts", default=False)


def trusted() -> bool:
    """Whether code that comes with a model may be run."""
    return _trusts.get()


@contextmanager
def trusting(yes: bool = True) -> Iterator[None]:
    """Trust models' own code within a `with` block, if `yes`. Trust given outside the block stays."""
    token = _trusts.set(yes or _trusts.get())
    try:
        yield
    finally:
        _trusts.reset(token)


def remote_classes(directory: Path) -> dict[str, str]:
    """The classes of a model's own code (`modeling_x.XModel`), by their Auto class."""
    found: dict[str, str] = {}
    for name in ("config.json", "tokenizer_config.json"):
        for auto, target in _auto_map(directory / name).items():
            each = next((one for one in target if one), None) if isinstance(target, list) else target
            if isinstance(each, str):
                found[auto] = each
    return found


def loading_class(class_name: str, *, model_type: str, where: Path) -> str:
    """The Auto class that loads a checkpoint with its head; its own class if no Auto class does."""
    from ffsplit.compat.transformers import auto_class_of

    for auto, target in remote_classes(where).items():
        if auto.startswith("AutoModel") and target.rpartition(".")[2] == class_name:
            return auto
    return auto_class_of(class_name, model_type=model_type) or class_name or "AutoModel"


def _auto_map(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except Exception:  # readers that need this file report it as invalid
        return {}
    found = fields.get("auto_map") if isinstance(fields, dict) else None
    return found if isinstance(found, dict) else {}


def check_trusted(directory: Path) -> None:
    """Raise ConfigError for a model with its own code, unless that is trusted."""
    classes = remote_classes(directory)
    if classes and not trusted():
        raise ConfigError(
            f"{directory} brings code of its own ({', '.join(sorted(set(classes.values())))}): read it, and "
            "give --trust-remote-code to run it"
        )


def code_files(directory: Path) -> tuple[str, ...]:
    """The files of a model's own code, sorted by name; empty if its config names none."""
    return tuple(sorted(path.name for path in directory.glob("*.py"))) if remote_classes(directory) else ()


# Which attention kernel models run with: the user's choice, or else the config's.
#
# Like trust, it is set once per process or `with` block; loaders read it from here. It is never written to
# a config.

ATTENTIONS: tuple[Attention, ...] = ("sdpa", "eager")
_STATED = ("attn_implementation", "_attn_implementation")
_chosen: ContextVar[Attention | None] = ContextVar("attention", default=None)


def chosen_attention() -> Attention | None:
    """The kernel that the user chose; None for the config's own."""
    return _chosen.get()


@contextmanager
def attending(attention: Attention | None) -> Iterator[None]:
    """Load models with this kernel within a `with` block; None keeps the current choice."""
    token = _chosen.set(attention or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def attention_options() -> dict[str, Any]:
    """The attention arguments for from_pretrained and from_config."""
    chosen = chosen_attention()
    return {} if chosen is None else {"attn_implementation": chosen}


def attention_advice(config: Mapping[str, Any]) -> str:
    """The fix for a model that does not load, if its config names a kernel that may be missing."""
    stated = next((value for value in _stated_in(config) if value not in ATTENTIONS), None)
    if stated is None or chosen_attention() is not None:
        return ""
    return f"config.json names the attention {stated!r}: give --attn-implementation {' or '.join(ATTENTIONS)}"


def _stated_in(config: Mapping[str, Any]) -> Iterator[str]:
    """The kernels that a config names, for the model or for a part of it."""
    for key, value in config.items():
        if key in _STATED:
            yield from (each for each in (value, *_values(value)) if isinstance(each, str))
        elif isinstance(value, Mapping):
            yield from _stated_in(value)


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else []
