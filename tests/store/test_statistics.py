"""Statistics of a published run: what holds none, or has lost them, is named."""

from pathlib import Path

import pytest

from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.store.artifact import STATISTICS_PATH, open_statistics
from ffsplit.store.store import Store

from .attempts import ATTEMPT, RUN_KEY, publish, publish_directory, write_attempt


def test_an_artifact_without_statistics_is_the_users_mistake(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path / "attempt")
    with pytest.raises(ConfigError, match=f"{store.uri} holds no neuron statistics: give an artifact"):
        open_statistics(store.uri)


def test_statistics_are_those_that_the_manifest_lists(store: Store, tmp_path: Path) -> None:
    publish_directory(store, write_attempt(tmp_path / "attempt", files={STATISTICS_PATH: b"sums"}))
    found = open_statistics(store.uri)
    assert found.path.read_bytes() == b"sums" and found.uri == f"{store.uri}/{RUN_KEY}/{ATTEMPT}"
    store.delete(f"{RUN_KEY}/{ATTEMPT}/{STATISTICS_PATH}")
    with pytest.raises(ArtifactError, match=f"{RUN_KEY}/{ATTEMPT}: {STATISTICS_PATH} is missing"):
        open_statistics(store.uri)
