"""What hardware a run says it took place on."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from ffsplit import machine as environment
from ffsplit.machine import describe_environment, hardware_fingerprint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nmodel name\t: Some: CPU @ 2 GHz\nmodel name\t: other\n", "Some: CPU @ 2 GHz"),
        ("processor : 0\nCPU implementer\t: 0x41\n", platform.processor() or platform.machine()),  # ARM
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_processor_has_a_name(
    text: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert expected
    assert hardware_fingerprint("cpu")["processor"] == expected
    assert describe_environment().hardware["processor"] == expected


def test_a_table_for_gpus_is_of_one_gpu() -> None:
    """Where there is none, of none: no table that was measured on one fits."""
    device = hardware_fingerprint("cuda")["device"]
    assert device == (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    assert hardware_fingerprint("cpu") == hardware_fingerprint("cuda") | {"device": "cpu"}
    assert ("gpu" in describe_environment().hardware) == torch.cuda.is_available()
