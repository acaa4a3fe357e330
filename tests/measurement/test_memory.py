"""Peak memory is measured in a process of its own, grows with the model, and fails in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.errors import FFSplitError
from ffsplit.measurement import memory
from ffsplit.measurement.memory import peak_memory_bytes
from ffsplit.models.checkpoint import open_checkpoint
from tests.tiny_models import save_checkpoint


def peak(directory: Path, class_name: str) -> int:
    return peak_memory_bytes(directory, class_name, shape=(1, 8), device="cpu", dtype="float32")


@pytest.mark.slow
def test_a_model_takes_at_least_its_weights(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "wide", "bert", intermediate_size=50_000)
    weights = sum(info.size_bytes for info in open_checkpoint(directory).tensors.values())
    assert weights > 38e6
    assert 0.9 * weights < peak(directory, "BertModel") < 4 * weights


def test_a_measurement_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FFSplitError, match=r"measuring the memory of .* failed: .*BertForNothing") as caught:
        peak(tmp_path, "BertForNothing")
    assert "\n" not in str(caught.value)


def test_a_measurement_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WITHIN_S", 0.01)
    with pytest.raises(FFSplitError, match=r"took longer than 0.01 s: .* --no-memory"):
        peak(tmp_path, "BertModel")


def test_where_the_system_has_no_proc_the_peak_comes_from_getrusage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In kibibytes, and on macOS in bytes. A parent's peak may be part of it."""
    by_proc = memory._resident_peak_bytes()
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "none")
    found = memory._resident_peak_bytes()
    assert 0.9 * by_proc < found < 100 * by_proc
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory._resident_peak_bytes() == pytest.approx(found / 1024, rel=0.1)
