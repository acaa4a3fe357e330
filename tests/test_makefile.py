"""What `make` would do, without doing it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "cluster").mkdir()
    for name in ("Makefile", "pyproject.toml", "cluster/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def planned(checkout: Path, target: str) -> list[str]:
    """The commands of a target, which are not run. Another make may run this test: its flags are not ours."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    found = subprocess.run(
        ["make", "-n", target], cwd=checkout, env=environment, capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()


def test_the_demo_installs_what_it_needs_and_no_more(checkout: Path) -> None:
    """pip shows its progress."""
    commands = planned(checkout, "demo")
    installed = [command for command in commands if " pip install " in command]
    assert [command.rpartition(" ")[2] for command in installed] == ["torch==2.13.0", "'.[demo]'"]
    assert not any("--quiet" in command for command in installed)
    assert commands[-1].endswith("examples/demo.py")


def test_the_second_demo_installs_nothing(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv/installed-demo").touch()
    (only,) = planned(checkout, "demo")
    assert only.endswith("examples/demo.py")
    assert any("dev" in command and "pip install" in command for command in planned(checkout, "test"))
