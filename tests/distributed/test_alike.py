"""A process with other versions than its driver's does no work."""

from __future__ import annotations

import pytest

from ffsplit import __version__
from ffsplit.distributed import alike
from ffsplit.distributed.alike import MUST_AGREE, check_alike, install, missing_package, versions_here
from ffsplit.distributed.observing import Observed
from ffsplit.errors import ConfigError


def test_the_same_versions_agree_in_any_build(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(versions_here())
    assert found.keys() == set(MUST_AGREE) and found["ffsplit"] == __version__
    assert not any("+" in version for version in found.values())
    check_alike(found)
    versions_here.cache_clear()
    monkeypatch.setattr(alike, "package_versions", lambda: {"torch": "2.13.0+cu130", "python": "3.11.7"})
    assert versions_here() == {"ffsplit": __version__, "torch": "2.13.0"}
    check_alike({"torch": "2.13.0"})
    versions_here.cache_clear()


@pytest.mark.parametrize("package", ["ffsplit", "transformers"])
def test_another_version_is_told_with_the_host(package: str) -> None:
    ours = versions_here()[package]
    with pytest.raises(
        ConfigError, match=rf"^host \S+ has {package} {ours}, this run's driver 0\.1a: install"
    ):
        check_alike(dict(versions_here()) | {package: "0.1a"})


def test_a_worker_that_joins_with_another_version_does_nothing() -> None:
    done: list[int] = []
    observed = Observed("s", "text", {}, {"torch": "1.0"})
    with pytest.raises(ConfigError, match=r"has torch .*, this run's driver 1\.0"):
        observed(done.append, 1)
    assert done == []
    Observed.here("s")(done.append, 1)
    assert done == [1]


def test_a_package_that_a_process_of_ray_lacks() -> None:
    assert (
        missing_package(ValueError("System error: No module named 'transformers.models'")) == "transformers"
    )
    assert missing_package(ValueError("No module named 'a'")) is None
    assert install("ffsplit") == f"has no ffsplit: install ffsplit {__version__} on every node"
    assert "with its dependencies" in install("transformers")
