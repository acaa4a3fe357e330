"""On several hosts: what all of them see, what is handed to those that do not, and what cannot be mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit import compute_profile as profile
from ffsplit.distributed.runner import SerialRunner
from ffsplit.errors import ConfigError
from ffsplit.run import execution, pipeline
from ffsplit.run.stages import measure as measure_stage
from ffsplit.run.stages.measure import MeasureJob
from ffsplit.store.store import open_store
from tests.small_jobs import SmallJob, digests

WEIGHTS = ("*.safetensors", "config.json", "stats/*.parquet")
DISTILL = "{kind: prune}, {kind: distill, num_steps: 2}"


class TwoHosts(SerialRunner):
    """Everything in this process, but of each question that hosts are asked there is a second answer."""

    is_spread = True

    def __init__(self, **differently: Any) -> None:
        self.differently = differently
        self.asked: list[str] = []

    def on_every_host(
        self, stage: str, function: Callable[[Any], Any], item: Any, *, within_s: float = 1
    ) -> dict[str, Any]:
        name = function.__name__
        self.asked.append(name)
        answer = function(item)
        return {"host-a": answer, "host-b": self.differently.get(name, answer)}


@pytest.fixture
def two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TwoHosts]:
    monkeypatch.setenv("FFSPLIT_CACHE", str(tmp_path / "cache"))

    def make(**differently: Any) -> TwoHosts:
        runner = TwoHosts(**differently)
        monkeypatch.setattr(pipeline, "make_runner", lambda config, workers_here: runner)
        return runner

    return make


@pytest.mark.parametrize("sees_the_model", [True, False])
def test_the_bytes_are_those_of_one_host(
    sees_the_model: bool,
    small_job: SmallJob,
    tmp_path: Path,
    two_hosts: Callable[..., TwoHosts],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where a host has to fetch the model; what is compressed is handed over through the store."""
    measured: list[MeasureJob] = []
    measure = measure_stage.measure_job
    monkeypatch.setattr(measure_stage, "measure_job", lambda job: measured.append(job) or measure(job))
    ffsplit.compress(small_job.config(tmp_path / "one"))
    capsys.readouterr()
    runner = two_hosts(is_here=sees_the_model)
    ffsplit.compress(small_job.config(tmp_path / "two"))
    assert digests(tmp_path / "one", *WEIGHTS) == digests(tmp_path / "two", *WEIGHTS)
    assert runner.asked == ["_is_visible", "is_here", *([] if sees_the_model else ["_fetch"])]
    said = f"{small_job.model}: 1 of 2 hosts do not see this model (host-b is one)"
    assert (said in capsys.readouterr().err) == (not sees_the_model)
    assert not (tmp_path / "two" / ".scratch").exists()
    compressed = measured[1].compressed.stored
    assert measured[0].compressed.stored is None and compressed is not None
    assert compressed.uri.startswith(f"{tmp_path}/two/.scratch/")
    assert "model.safetensors" in {entry.path for entry in compressed.files}


def test_a_directory_that_a_host_does_not_see_is_refused(
    small_job: SmallJob, tmp_path: Path, two_hosts: Callable[..., TwoHosts]
) -> None:
    two_hosts(_is_visible=False)
    with pytest.raises(ConfigError, match=r"1 of 2 hosts do not see this directory \(host-b is one\)"):
        ffsplit.compress(small_job.config(tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_hosts_that_fit_otherwise_are_refused(
    dtype: str,
    small_job: SmallJob,
    tmp_path: Path,
    two_hosts: Callable[..., TwoHosts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where one has no instructions for bfloat16; with --dtype float32 nobody needs any."""
    for module in (profile, execution):
        monkeypatch.setattr(module, "multiplies_bfloat16", multiplies_bfloat16)
    runner = two_hosts(multiplies_bfloat16=False)
    config = small_job.config(tmp_path / "out", recipe=small_job.recipe(step=DISTILL), dtype=dtype)
    if dtype == "float32":
        assert ffsplit.compress(config).plain
        assert "multiplies_bfloat16" not in runner.asked
        return
    with pytest.raises(ConfigError, match=r"1 of 2 hosts .* \(host-b is one\): give --dtype float32"):
        ffsplit.compress(config)
    assert runner.asked == ["multiplies_bfloat16"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def multiplies_bfloat16(device: str) -> bool:
    """This host, as one that does."""
    return True


@pytest.mark.s3
def test_what_lies_in_a_store_is_asked_of_no_host(
    small_job: SmallJob, s3_uri: str, tmp_path: Path, two_hosts: Callable[..., TwoHosts]
) -> None:
    """Each fetches the model from where it is."""
    runner = two_hosts()
    store = open_store(f"{s3_uri}-models")
    for path in small_job.model.iterdir():
        store.put_file(path.name, path)
    manifest = ffsplit.compress(small_job.config(s3_uri, model=f"{s3_uri}-models"))
    here = ffsplit.compress(small_job.config(tmp_path / "here"))
    assert runner.asked == ["_fetch", "_is_visible", "is_here"]
    of_both = (
        {entry.path: entry.sha256 for entry in each.files if entry.path.endswith(".safetensors")}
        for each in (manifest, here)
    )
    assert next(of_both) == next(of_both)
