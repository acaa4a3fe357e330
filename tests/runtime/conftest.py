"""Compressed checkpoints, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import CheckpointFactory
from tests.runtime.compressed import Compressed, compress, head_of

CompressedFactory = Callable[..., Compressed]


@pytest.fixture(scope="session")
def compressed_of(
    checkpoint_of: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> CompressedFactory:
    """`compressed_of("bert", recipe="paper", keep=0.3)`, with the family's usual task head by default."""
    made: dict[tuple[Any, ...], Compressed] = {}

    def make(family: str, *, recipe: str, keep: Any = 0.3535, head: str | None = None) -> Compressed:
        key = (family, recipe, keep, head)
        if key not in made:
            source = checkpoint_of(family, head=head_of(family) if head is None else head)
            target = tmp_path_factory.mktemp("compressed") / "artifact"
            made[key] = compress(source, target, recipe=recipe, keep=keep)
        return made[key]

    return make
