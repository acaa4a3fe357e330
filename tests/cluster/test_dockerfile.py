"""The Dockerfile: what hadolint says of it, and that what it copies and pins is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, ROOT, constraint, of_kind

PATH = CLUSTER / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments, lines that go on joined, comments left out."""
    lines = [line for line in PATH.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(name, rest) for name, rest in found]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def hadolint(text: str) -> str:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.subprocess
def test_hadolint_finds_nothing_wrong() -> None:
    assert hadolint(PATH.read_text("utf-8")) == ""


@pytest.mark.subprocess
def test_hadolint_says_what_is_wrong() -> None:
    text = PATH.read_text("utf-8").replace("USER 1000:1000", "USER root")
    assert "USER should not be root" in hadolint(text)


def test_it_pins_what_the_constraints_pin() -> None:
    assert f"TORCH={constraint('torch')}" in arguments("ARG")
    installs = [line for line in arguments("RUN") if "pip install" in line]
    assert len(installs) == 3
    assert all("--constraint cluster/constraints.txt" in line or "--no-deps" in line for line in installs)
    (base,) = arguments("FROM")
    assert base == "python:${PYTHON}"
    assert re.fullmatch(r"PYTHON=3\.11-slim-\w+", arguments("ARG")[0])


def test_cpu_or_gpu_is_an_argument_that_is_checked() -> None:
    assert {"DEVICE=cpu", "TORCH_INDEX="} <= set(arguments("ARG"))
    (torch,) = (line for line in arguments("RUN") if "torch==" in line)
    assert '[ "$built" = "$DEVICE" ]' in torch
    assert "exit 1" in torch


def test_it_runs_as_the_user_of_the_pods() -> None:
    assert arguments("USER") == ["1000:1000"]
    spec = of_kind("RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert spec["securityContext"]["runAsUser"] == 1000
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("RUN", "COPY"))


def test_it_has_no_token_and_does_not_start_ray_without_one() -> None:
    text = " ".join(arguments("ENV"))
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_AUTH_TOKEN" not in text
    assert "AWS_" not in PATH.read_text("utf-8")


def test_what_it_copies_is_there_and_not_ignored() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")
    }
    copied = {source for rest in arguments("COPY") for source in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_the_entrypoints_are_where_the_jobs_are_copied_to() -> None:
    assert arguments("WORKDIR") == ["/opt/ffsplit"]
    assert "jobs jobs" in arguments("COPY")
    assert of_kind("RayJob")["spec"]["entrypoint"].startswith("python /opt/ffsplit/jobs/")
