"""The units: what systemd itself says of them, and that they carry no secret."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER
from tests.cluster.rules import job_arguments

UNITS = sorted((CLUSTER / "systemd").glob("ffsplit-*.*"))
INSTALLED = "/opt/ffsplit/"


class Repeated(dict):  # type: ignore[type-arg]
    """Keys that stand more than once keep all their values."""

    def __setitem__(self, key: str, value: object) -> None:
        if key in self and isinstance(value, list):
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


def unit(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(dict_type=Repeated, strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(CLUSTER / "systemd" / name)
    return parser


def verify(path: Path) -> str:
    """What systemd says of a unit: nothing, if it is right."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    command = [analyze, "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.subprocess
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong(path: Path, tmp_path: Path) -> None:
    for each in UNITS:  # the programs are not installed here: any other takes their place
        text = each.read_text("utf-8").replace(f"{INSTALLED}.venv/bin/ray", "/bin/true")
        text = text.replace(f"WorkingDirectory={INSTALLED[:-1]}", "WorkingDirectory=/")
        (tmp_path / each.name).write_text(text)
    assert verify(tmp_path / path.name) == ""


@pytest.mark.subprocess
def test_systemd_says_what_is_wrong(tmp_path: Path) -> None:
    text = (CLUSTER / "systemd" / "ffsplit-zoo.timer").read_text("utf-8")
    (tmp_path / "wrong.timer").write_text(text.replace("OnCalendar=*-*-* 02", "OnCalendar=*-*-* 26"))
    assert "calendar specification" in verify(tmp_path / "wrong.timer")


def test_the_batch_submits_a_job_with_flags_that_it_takes() -> None:
    command = shlex.split(unit("ffsplit-zoo.service")["Service"]["ExecStart"])
    assert command[:3] == [f"{INSTALLED}.venv/bin/ray", "job", "submit"]
    _, script, *arguments = command[command.index("--") + 1 :]
    folder = command[command.index("--working-dir") + 1]
    assert list(job_arguments(f"{folder.removeprefix(INSTALLED)}/{script}", arguments)) == []


@pytest.mark.parametrize("name", ["ffsplit-ray.service", "ffsplit-zoo.service"])
def test_the_token_is_a_credential(name: str) -> None:
    service = unit(name)["Service"]
    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%d/ray-auth-token" in service["Environment"]
    assert "ray-auth-token:/etc/ffsplit/ray-auth-token" in service["LoadCredential"]
    assert service["User"] == "ffsplit"
    assert service["NoNewPrivileges"] == "true"
    assert service["ProtectSystem"] == "strict"


@pytest.mark.subprocess
@pytest.mark.parametrize("changes", ["2026-03-29", "2026-10-25"])
def test_summer_time_neither_skips_a_batch_nor_repeats_it(changes: str) -> None:
    """systemd's own calendar, on a machine in Berlin: there is a batch every 24 hours."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    calendar = unit("ffsplit-zoo.timer")["Timer"]["OnCalendar"]
    begins = datetime.fromisoformat(changes) - timedelta(days=2)
    done = subprocess.run(
        ["systemd-analyze", "calendar", "--iterations=5", f"--base-time={begins}", calendar],
        capture_output=True,
        text=True,
        env=os.environ | {"TZ": "Europe/Berlin", "LC_ALL": "C"},
        check=True,
    )
    found = re.findall(r"\(in UTC\): \w+ (\S+ \S+) UTC", done.stdout)
    times = [datetime.fromisoformat(text) for text in found]
    assert [later - time for time, later in pairwise(times)] == [timedelta(days=1)] * 4


def test_the_timer_does_not_start_a_batch_that_runs() -> None:
    """systemd leaves a service alone that is active; of type oneshot it is, until its command has ended."""
    service = unit("ffsplit-zoo.service")["Service"]
    assert service["Type"] == "oneshot" and "RemainAfterExit" not in service
    assert "--no-wait" not in service["ExecStart"]
    assert service["TimeoutStartSec"] == "6h", "less than a day: the next batch finds it ended"


def test_the_timer_starts_the_batch() -> None:
    timer = unit("ffsplit-zoo.timer")["Timer"]
    assert "Unit" not in timer  # the service of the same name
    assert timer["Persistent"] == "true"
    assert unit("ffsplit-zoo.service")["Service"]["Type"] == "oneshot"
    assert unit("ffsplit-zoo.service")["Unit"]["Requires"] == "ffsplit-ray.service"
