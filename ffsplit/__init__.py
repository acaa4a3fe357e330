"""FFSplit: distributed batch compression of transformer models by splitting their feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from ffsplit.api import calibrate as calibrate
    from ffsplit.api import compress as compress
    from ffsplit.config import JobConfig as JobConfig
    from ffsplit.errors import ArtifactError as ArtifactError
    from ffsplit.errors import BudgetError as BudgetError
    from ffsplit.errors import CalibrationError as CalibrationError
    from ffsplit.errors import ConfigError as ConfigError
    from ffsplit.errors import FFSplitError as FFSplitError
    from ffsplit.errors import GateError as GateError
    from ffsplit.errors import RunError as RunError
    from ffsplit.errors import StoreError as StoreError
    from ffsplit.errors import UnsupportedModelError as UnsupportedModelError
    from ffsplit.forecasts import inspect as inspect
    from ffsplit.forecasts import plan as plan
    from ffsplit.runtime.plugin import load as load
    from ffsplit.store.manifest import Manifest as Manifest
    from ffsplit.store.pull import pull as pull
    from ffsplit.store.pull import verify as verify
    from ffsplit.store.push import push as push

__version__ = "0.1.0"

_HOMES = {
    "ffsplit.api": ("calibrate", "compress"),
    "ffsplit.config": ("JobConfig",),
    "ffsplit.errors": (
        "ArtifactError",
        "BudgetError",
        "CalibrationError",
        "ConfigError",
        "FFSplitError",
        "GateError",
        "RunError",
        "StoreError",
        "UnsupportedModelError",
    ),
    "ffsplit.forecasts": ("inspect", "plan"),
    "ffsplit.runtime.plugin": ("load",),
    "ffsplit.store.manifest": ("Manifest",),
    "ffsplit.store.pull": ("pull", "verify"),
    "ffsplit.store.push": ("push",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import ffsplit` stays light."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ffsplit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


@wrapt.when_imported("transformers.quantizers.auto")
def _register_with_transformers(_: Any) -> None:
    """Teach transformers to load split checkpoints, at once if it is imported already, else when it is."""
    from importlib import import_module

    import_module("ffsplit.runtime.plugin")
