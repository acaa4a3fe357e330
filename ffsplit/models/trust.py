"""Models that bring code of their own: it is run only where the user trusts it.

Whether that is so is said once for a process or a part of its work, and every load asks here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ffsplit.errors import ConfigError

_trusts: ContextVar[bool] = ContextVar("trusts", default=False)


def trusted() -> bool:
    """Whether code that comes with a model may be run."""
    return _trusts.get()


@contextmanager
def trusting(yes: bool = True) -> Iterator[None]:
    """Trust, or not, for a while. What is trusted already stays so."""
    token = _trusts.set(yes or _trusts.get())
    try:
        yield
    finally:
        _trusts.reset(token)


def remote_classes(directory: Path) -> dict[str, str]:
    """The classes of a model's own code, by the Auto class that they stand for: `modeling_x.XModel`."""
    found: dict[str, str] = {}
    for name in ("config.json", "tokenizer_config.json"):
        for auto, target in _auto_map(directory / name).items():
            each = next((one for one in target if one), None) if isinstance(target, list) else target
            if isinstance(each, str):
                found[auto] = each
    return found


def _auto_map(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except Exception:  # whoever needs what the file says finds that it does not hold, and says so
        return {}
    found = fields.get("auto_map") if isinstance(fields, dict) else None
    return found if isinstance(found, dict) else {}


def check_trusted(directory: Path) -> None:
    """Raise ConfigError for a model with code of its own, unless that is trusted."""
    classes = remote_classes(directory)
    if classes and not trusted():
        raise ConfigError(
            f"{directory} brings code of its own ({', '.join(sorted(set(classes.values())))}): read it, and "
            "give --trust-remote-code to run it"
        )


def code_files(directory: Path) -> tuple[str, ...]:
    """A model's own code, sorted by name; nothing where its config names none."""
    return tuple(sorted(path.name for path in directory.glob("*.py"))) if remote_classes(directory) else ()
