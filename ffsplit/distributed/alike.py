"""Every process of a run has the same software: other versions give other bytes, or other errors."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from functools import cache

from ffsplit import __version__
from ffsplit.errors import ConfigError
from ffsplit.machine import package_versions

MUST_AGREE = ("ffsplit", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")
"""Ray compares its own version and Python's."""

_MISSING = re.compile(r"System error: No module named '(\w+)")


@cache
def versions_here() -> Mapping[str, str]:
    """The versions of this process's packages, whatever build they are: 2.13.0 for 2.13.0+cpu."""
    found = package_versions() | {"ffsplit": __version__}
    return {name: found[name].partition("+")[0] for name in MUST_AGREE if name in found}


def check_alike(expected: Mapping[str, str]) -> None:
    """Raise ConfigError, in a process on any host, if its packages are not the driver's."""
    here = versions_here()
    other = [name for name, version in expected.items() if here.get(name) != version]
    if other:
        name = other[0]
        raise ConfigError(
            f"host {socket.gethostname()} has {name} {here.get(name, 'of no version')}, this run's driver "
            f"{expected[name]}: install the same versions on every node, such as one image for all"
        )


def check_host(expected: Mapping[str, str]) -> bool:
    """Run as a task on a host: True, or ConfigError as `check_alike` raises it."""
    check_alike(expected)
    return True


def missing_package(error: BaseException) -> str | None:
    """The package that a process of Ray could not import in order to begin; None for any other error."""
    match = _MISSING.search(str(error))
    return match[1] if match else None


def install(package: str) -> str:
    """How to give a host a package that it lacks."""
    of_ours = "" if package == "ffsplit" else ", with its dependencies"
    return f"has no {package}: install ffsplit {__version__}{of_ours} on every node"
