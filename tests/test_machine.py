"""What this machine can compute with."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ffsplit import machine
from ffsplit.errors import ConfigError
from ffsplit.machine import (
    bytes_below,
    check_device,
    computes_in,
    device_of,
    free_bytes,
    multiplies_bfloat16,
    num_workers_here,
    usable_cores,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_processor_computes_in_the_dtypes_that_are_offered(dtype: str) -> None:
    assert computes_in("cpu", dtype)


def test_a_dtype_without_products_is_refused() -> None:
    """torch multiplies no matrices of bare exponents."""
    with pytest.raises(ConfigError, match="--dtype float8_e8m0fnu: this machine's CPU"):
        check_device("cpu", "float8_e8m0fnu")


def test_what_multiplies_bfloat16_is_faster_at_it() -> None:
    """Where the processor has instructions for it, which is less sure the other way round."""
    if not multiplies_bfloat16("cpu"):
        pytest.skip("this processor has no instructions for bfloat16")
    a = torch.ones(768, 768)
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        b = a.to(dtype)
        times[dtype] = min(timeit.repeat(lambda b=b: b @ b, number=1, repeat=9))
    assert times[torch.bfloat16] < times[torch.float32]


QUOTAS: dict[str, tuple[str, Mapping[str, str], int]] = {
    "v2": ("0::/pod", {"pod/cpu.max": "400000 100000"}, 4),
    "v2, none": ("0::/pod", {"pod/cpu.max": "max 100000"}, 64),
    "v2, below one core": ("0::/pod", {"pod/cpu.max": "50000 100000"}, 1),
    "v2, part of a core": ("0::/pod", {"pod/cpu.max": "390000 100000"}, 3),
    "v2, the outer group's": ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
    "v2, as a container sees it": ("0::/../host/path", {"cpu.max": "300000 100000"}, 3),
    "v1": ("4:cpu:/pod", {"cpu/pod/cpu.cfs_quota_us": "600000", "cpu/pod/cpu.cfs_period_us": "200000"}, 3),
    "v1, none": ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    "v1, mounted together": (
        "4:cpu,cpuacct:/pod",
        {"cpu,cpuacct/pod/cpu.cfs_quota_us": "500000", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000"},
        5,
    ),
    "v1, as a container sees it": (
        "4:cpu,cpuacct:/docker/0123",
        {"cpu,cpuacct/cpu.cfs_quota_us": "700000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        7,
    ),
    "another kind's": ("3:cpuset:/pod", {"cpuset/pod/cpu.max": "100000 100000"}, 64),
    "damaged": ("0::/pod", {"pod/cpu.max": "", "cpu.max": "100000 0"}, 64),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_a_quota_is_followed(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, files, expected = QUOTAS[case]
    own = tmp_path / "self"
    own.write_text(f"9:name=systemd:/\n{line}\n")
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert usable_cores() == expected
    assert num_workers_here(None, threads=2, on_gpu=False) == max(1, expected // 2)
    assert num_workers_here(1000, threads=1, on_gpu=False) == expected


def test_where_no_affinity_is_known_every_core_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, which has no control groups either."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    assert usable_cores() == 6


KILLS = {
    "of version 2": ("0::/pod", {"pod/memory.events": "low 0\noom 3\noom_kill 2\n", "memory.events": ""}, 2),
    "of version 1": ("4:memory:/pod", {"memory/pod/memory.oom_control": "under_oom 0\noom_kill 5"}, 5),
    "damaged": ("0::/pod", {"pod/memory.events": "oom_kill", "memory.events": "oom_kill 1"}, 1),
}


@pytest.mark.parametrize("case", KILLS)
def test_processes_that_were_killed_for_memory_are_counted(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, files, expected = KILLS[case]
    (tmp_path / "self").write_text(f"9:name=systemd:/\n{line}\n")
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "self")
    assert machine.oom_kills() == expected
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    assert machine.oom_kills() >= 0, "of the whole machine"


@pytest.mark.parametrize("below", ["not/there", "x" * 300])
def test_a_place_that_is_not_there_is_on_the_disk_above_it(tmp_path: Path, below: str) -> None:
    assert device_of(tmp_path / below) == tmp_path.stat().st_dev
    assert free_bytes(tmp_path / below) > 0


def test_what_is_below_a_folder_is_counted_without_what_is_gone(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(bytes(7))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert (bytes_below(tmp_path), bytes_below(tmp_path / "none")) == (7, 0)


@pytest.mark.subprocess
def test_affinity_is_followed() -> None:
    code = "from ffsplit.machine import usable_cores; print(usable_cores())"
    one = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(["taskset", "-c", one, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n"


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("group", "name", "limit"),
    [("cpu", "cpu.cfs_quota_us", "50000"), ("memory", "memory.limit_in_bytes", str(2**30))],
)
def test_a_real_control_group_is_followed(group: str, name: str, limit: str) -> None:
    folder = Path("/sys/fs/cgroup", group, f"ffsplit-test-{os.getpid()}")
    if not Path("/sys/fs/cgroup", group, name).exists():
        pytest.skip("no cgroup v1 here")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("not allowed to make a control group")
    code = "from ffsplit.machine import *; print(usable_cores(), memory_limit_bytes())"
    enter = f'echo $$ > {folder}/cgroup.procs; exec "$0" "$@"'
    try:
        (folder / name).write_text(limit)
        done = subprocess.run(
            ["bash", "-c", enter, sys.executable, "-c", code], capture_output=True, text=True
        )
    finally:
        folder.rmdir()
    cores, memory = map(int, done.stdout.split())
    assert cores == 1 if group == "cpu" else memory == 2**30


@pytest.mark.subprocess
def test_what_an_item_of_a_stage_frees_goes_back_to_the_system() -> None:
    code = """if True:
        import psutil
        from ffsplit.distributed.runner import SerialRunner

        def work(number):
            pieces = [bytes(100_000) for _ in range(2_000)]
            return pieces[-1]  # lies behind the others, which are freed

        process = psutil.Process()
        before = process.memory_info().rss
        answers = list(SerialRunner().map_tasks("stage", work, [0, 1]))
        print(process.memory_info().rss - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) < 50e6, done.stderr
