"""Fixtures of all tests. The hub is never asked: every model is made here."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers or huggingface_hub
os.environ.pop("COLUMNS", None)  # set in workers of pytest-xdist: what is printed would wrap
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's own 15, workers starve on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on more, the more so on a busy machine

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.fast_set import arrange, scheduler
from tests.s3_server import s3_endpoint, s3_uri
from tests.small_jobs import small_job

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started with &

__all__ = ["s3_endpoint", "s3_uri", "small_job"]

CheckpointFactory = Callable[..., Path]

settings.register_profile("ffsplit", deadline=None)  # a busy machine is no failure
settings.load_profile("ffsplit")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    arrange(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`checkpoint_of("bert", head="ForMaskedLM")`: a tiny checkpoint, made once, not to be written to."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, **options: Any) -> Path:
        from tests.tiny_models import save_checkpoint

        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(f"{family}-"), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def development_data() -> Path:
    """The folder of development data; tests that need it are skipped where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FFSPLIT_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no development data in {folder}: set FFSPLIT_DATA")
    return folder
