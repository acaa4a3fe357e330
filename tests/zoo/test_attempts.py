"""A model that runs out of memory is tried once more with less of it, and its batch says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli.batch_lines import print_batch
from ffsplit.config import JobConfig
from ffsplit.store.pull import verify
from ffsplit.zoo.attempts import Attempts, leaner
from ffsplit.zoo.process import Ended
from ffsplit.zoo.run import run_zoo
from tests.small_jobs import SmallJob
from tests.zoo.test_run import zoo, zoo_file

DONE, FAILED, MISTAKE = Ended(0, "", None), Ended(1, "no route", None), Ended(2, "not so", None)
RAN_OUT = Ended(1, "CUDA out of memory", None, is_out_of_memory=True)
HUNGRY = """\
import sys
import torch
from ffsplit.run.stages import calibrate
from ffsplit.zoo import process

def hungry(load):
    def loading(*arguments, **options):
        {hog}
        return load(*arguments, **options)
    return loading

for name in {names}:
    setattr(calibrate, name, hungry(getattr(calibrate, name)))
sys.exit(process.main())
"""
"""A model's process, which has too little memory for what these names load in calibration."""


def hungry(folder: Path, hog: str, *, names: Sequence[str] = ("load_base_model",)) -> Path:
    """A program in the place of Python that runs a model in a process with too little memory."""
    script, program = folder / "hungry.py", folder / "python"
    script.write_text(HUNGRY.format(hog=hog, names=tuple(names)))
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    program.chmod(0o755)
    return program


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[list[str]]:
    """How to run a command in a control group with so much memory. Skips where none can be made."""
    folder = Path("/sys/fs/cgroup/memory", f"ffsplit-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("not allowed to make a control group, or no cgroup v1 here")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(num_bytes))
        yield ["bash", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$0" "$@"']
    finally:
        folder.rmdir()


def job(**fields: Any) -> JobConfig:
    return JobConfig(**({"model": "m", "out": "/out", "runner": "ray", "workers": 5} | fields))


def test_half_the_workers_come_first_but_not_on_gpus() -> None:
    half, whole = "with 2 workers instead of 5", "block by block"
    assert [lean.how for lean in leaner(job())] == [half, whole]
    assert [lean.how for lean in leaner(job(device="cuda"))] == [whole, half]
    assert [lean.how for lean in leaner(job(gpus_per_worker=0.5))] == [whole, half]
    assert [lean.how for lean in leaner(job(workers=1))] == [whole]
    assert [lean.how for lean in leaner(job(runner="serial"))] == [whole]
    assert [lean.how for lean in leaner(job(workers=2, block_by_block=True))] == [
        "with 1 worker instead of 2"
    ]
    assert [lean.job.workers for lean in leaner(job())] == [2, 5]
    assert [lean.job.block_by_block for lean in leaner(job())] == [False, True]


def test_it_is_tried_once_more_whatever_retries_are() -> None:
    attempts = Attempts(job(), retries=0, backoff_s=30)
    another = attempts.follow(RAN_OUT)
    assert another is not None and another.wait_s == 30
    assert another.told == "out of memory, retry in 30 s with 2 workers instead of 5: CUDA out of memory"
    assert attempts.job.workers == 2
    assert attempts.follow(RAN_OUT) is None
    assert (attempts.number, attempts.outcome, attempts.less_memory) == (
        2,
        RAN_OUT,
        "with 2 workers instead of 5",
    )


def test_a_model_that_cannot_be_run_so_is_tried_another_way() -> None:
    attempts = Attempts(job(device="cuda"), retries=1, backoff_s=0)
    assert attempts.follow(RAN_OUT) is not None and attempts.less_memory == "block by block"
    assert attempts.follow(MISTAKE) is not None and attempts.less_memory == "with 2 workers instead of 5"
    assert not attempts.job.block_by_block
    assert attempts.follow(DONE) is None and attempts.outcome == DONE


def test_without_another_way_the_memory_is_the_reason() -> None:
    attempts = Attempts(job(runner="serial"), retries=0, backoff_s=0)
    attempts.follow(RAN_OUT)
    assert attempts.follow(MISTAKE) is None
    assert (attempts.outcome, attempts.less_memory) == (RAN_OUT, None)
    attempts = Attempts(job(runner="serial", block_by_block=True), retries=1, backoff_s=4)
    another = attempts.follow(RAN_OUT)  # other models may have taken the memory: an ordinary retry
    assert another is not None and another.told == "failed, retry in 4 s: CUDA out of memory"


def test_other_failures_are_retried_with_less_memory_too() -> None:
    attempts = Attempts(job(), retries=1, backoff_s=0)
    attempts.follow(FAILED)
    attempts.follow(RAN_OUT)
    assert attempts.follow(FAILED) is None, "one retry was used before"
    attempts = Attempts(job(), retries=1, backoff_s=0)
    attempts.follow(RAN_OUT)
    assert attempts.follow(FAILED) is not None and attempts.job.workers == 2


def test_an_allocation_that_fails_is_tried_block_by_block(
    small_job: SmallJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch itself is refused the memory."""
    monkeypatch.setattr(sys, "executable", str(hungry(small_job.folder, "torch.empty(1 << 60)")))
    said: list[str] = []
    asked = zoo(small_job, {"name": "large"}, retries=0, backoff_s=0)
    batch = run_zoo(asked, runner="serial", say=said.append)
    (large,) = batch.models
    assert (large.state, large.num_attempts, large.less_memory) == ("published", 2, "block by block")
    (told,) = (line for line in said if "retry" in line)
    assert told.startswith("large | out of memory, retry in 0 s block by block: calibrate of shard-00000")
    assert "can't allocate memory" in told and told.endswith("give fewer --workers, or --block-by-block")
    folder = Path(asked.destination)
    assert verify(str(folder / "large")).ok
    stored = json.loads((folder / f"batches/{batch.id}.json").read_text())
    assert stored["models"][0]["less_memory"] == "block by block"
    assert "out of memory, then block by block" in (folder / "index.html").read_text()
    print_batch(batch, destination=asked.destination)
    assert "  it ran out of memory, then ran block by block\n" in capsys.readouterr().out


def test_a_model_that_never_fits_has_failed(small_job: SmallJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt block by block runs out of memory as well: two attempts, although four were allowed."""
    program = hungry(small_job.folder, "raise MemoryError", names=("load_base_model", "StreamedModel"))
    monkeypatch.setattr(sys, "executable", str(program))
    asked = zoo(small_job, {"name": "large"}, retries=3, backoff_s=0)
    (large,) = run_zoo(asked, runner="serial", say=lambda line: None).models
    assert (large.state, large.num_attempts, large.less_memory) == ("failed", 2, "block by block")
    assert large.error is not None and "MemoryError" in large.error


@pytest.mark.subprocess
@pytest.mark.slow
def test_a_process_that_the_kernel_kills_for_memory(small_job: SmallJob) -> None:
    """In a control group of its own, with a real limit: the batch lives, the model's process does not."""
    program = hungry(small_job.folder, "print('ffsplit: filling up'); bytearray(4 << 30)")
    file = zoo_file(small_job, {"name": "large"}, retries=0, backoff_s=0)
    code = f"import sys; sys.executable = {str(program)!r}; from ffsplit.cli import main; "
    code += f"raise SystemExit(main(['zoo', {str(file)!r}, '--runner', 'serial', '--json']))"
    with limited_memory(2 << 30) as enter:
        done = subprocess.run(
            [*enter, sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300
        )
    assert done.returncode == 0, done.stderr
    (large,) = json.loads(done.stdout)["models"]
    assert (large["state"], large["num_attempts"]) == ("published", 2)
    assert large["less_memory"] == "block by block"
    (told,) = (line for line in done.stderr.splitlines() if "retry" in line)
    assert "the system ran out of memory and killed its process; last output: filling up" in told


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_ray_kills_for_memory(small_job: SmallJob, tmp_path: Path) -> None:
    """By Ray's own monitor, set so low that it finds every worker too large."""
    file = zoo_file(small_job, {"name": "large", "workers": 2}, retries=3, backoff_s=0)
    strict = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "50"}
    done = subprocess.run(
        [sys.executable, "-m", "ffsplit.cli", "zoo", str(file), "--json"],
        capture_output=True,
        text=True,
        env=os.environ | strict,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    (large,) = json.loads(done.stdout)["models"]
    assert (large["state"], large["num_attempts"]) == ("failed", 2)
    assert large["less_memory"] == "with 1 worker instead of 2"
    (told,) = (line for line in done.stderr.splitlines() if "retry" in line)
    assert told.startswith("large | out of memory, retry in 0 s with 1 worker instead of 2: ")
    assert "its host was out of memory" in told
