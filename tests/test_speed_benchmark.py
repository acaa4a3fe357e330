"""The speed benchmark refuses a busy machine, says what else ran, and times other tools beside it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(("load", "is_quiet"), [(0.99, True), (1.0, False), (7.3, False)])
def test_a_page_needs_a_load_below_one(load: float, is_quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import speed_load

    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    if is_quiet:
        assert speed_load.quiet_load() == load
        return
    with pytest.raises(SystemExit) as refused:
        speed_load.quiet_load()
    said = str(refused.value)
    assert said.startswith(f"load average {load:.1f}: a page is made only below 1") and "\n" not in said


def test_what_other_processes_use_is_told_apart_from_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All CPUs worked for 6 s of 10, this process and its children for 4: two tenths of a CPU are others'."""
    import speed_load

    ticks, stat = os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    monkeypatch.setattr(speed_load, "STAT", stat)
    monkeypatch.setattr(speed_load.time, "perf_counter", iter((100.0, 110.0, 120.0)).__next__)
    monkeypatch.setattr(speed_load, "_own_s", iter((1.0, 5.0, 9.0)).__next__)
    stat.write_text(f"cpu 0 0 0 {7 * ticks} {5 * ticks} 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    watched = speed_load.Others()
    work = [3, 1, 1, 90, 30, 0, 1, 0, 3, 0]  # user, nice, system, idle, waiting, interrupts, stolen, guests
    stat.write_text(f"cpu {' '.join(str(each * ticks) for each in work)}\n")
    assert watched.mean_cpus() == pytest.approx(0.2)
    assert watched.mean_cpus() == 0, "never below"


@pytest.mark.slow
def test_other_tools_are_timed_or_their_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import speed_models
    import speed_tables

    monkeypatch.setitem(speed_models.BERTS, "tiny", TINY)
    monkeypatch.setattr(speed_tables, "SHAPES", ((8, 16), (1, 16)))
    page = "\n".join(speed_tables.encoder_table("tiny", quick=True))
    for name in (
        "dense",
        "keep .3535",
        "recipe paper",
        "recipe int8",
        "torch dynamic int8",
        "onnxruntime int8",
    ):
        assert f"\n| {name} | " in page
    compiles = shutil.which("g++") is not None
    assert ("\n| recipe int8, compiled | " in page) == compiles
    assert ("- recipe int8, compiled: not run here" in page) != compiles
    for name in ("OpenVINO", "OpenVINO int8"):
        is_there = all(map(importlib.util.find_spec, ("openvino", "nncf")))
        assert (f"\n| {name} | " in page) == is_there
        assert (f"- {name}: not run here" in page) != is_there
    assert "8 x 16, 2 rounds | 1 x 16, 2 rounds" in page
    gains = re.findall(
        r"- recipe int8 over the dense model by (.*): \d.*x at 8 x 16, \d.*x at 1 x 16 \(", page
    )
    assert gains[:2] == ["torch dynamic int8", "onnxruntime int8"]
