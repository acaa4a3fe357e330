"""Both stores, each empty and of its own."""

from pathlib import Path

import pytest

from ffsplit.store.store import Store, open_store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a store that holds nothing, one of each kind in turn."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_uri"))
    return str(tmp_path / "store" / "zoo")


@pytest.fixture
def store(store_uri: str) -> Store:
    return open_store(store_uri)
