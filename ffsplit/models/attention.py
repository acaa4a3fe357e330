"""Which attention kernel models run with: what their config names, or what the user does.

As with trust in a model's own code, it is set once for a process or a part of its work, and every load
reads it here. It is written into no config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffsplit.config import Attention

ATTENTIONS: tuple[Attention, ...] = ("sdpa", "eager")
_STATED = ("attn_implementation", "_attn_implementation")
_chosen: ContextVar[Attention | None] = ContextVar("attention", default=None)


def chosen_attention() -> Attention | None:
    """The kernel that the user chose, None for the config's own."""
    return _chosen.get()


@contextmanager
def attending(attention: Attention | None) -> Iterator[None]:
    """Load models with a kernel for a while; None keeps what is chosen already."""
    token = _chosen.set(attention or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def attention_options() -> dict[str, Any]:
    """What from_pretrained and from_config are told."""
    chosen = chosen_attention()
    return {} if chosen is None else {"attn_implementation": chosen}


def attention_advice(config: Mapping[str, Any]) -> str:
    """What to do about a model that does not load, where its config names a kernel that may be missing."""
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
