"""FFSplit: distributed batch compression of transformer models by splitting their feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from ffsplit.config import JobConfig as JobConfig
    from ffsplit.errors import FFSplitError as FFSplitError
    from ffsplit.run.driver import compress as compress
    from ffsplit.runtime.plugin import load as load
    from ffsplit.store.manifest import Manifest as Manifest

__version__ = "0.1.0"
__all__ = ["FFSplitError", "JobConfig", "Manifest", "compress", "load"]

_HOMES = {
    "FFSplitError": "ffsplit.errors",
    "JobConfig": "ffsplit.config",
    "Manifest": "ffsplit.store.manifest",
    "compress": "ffsplit.run.driver",
    "load": "ffsplit.runtime.plugin",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import ffsplit` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ffsplit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


@wrapt.when_imported("transformers.quantizers.auto")
def _register_with_transformers(_: Any) -> None:
    """Teach transformers to load split checkpoints: at once where it is imported, else when it is."""
    from importlib import import_module

    import_module("ffsplit.runtime.plugin")
