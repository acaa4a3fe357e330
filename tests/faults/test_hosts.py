"""A cluster whose nodes do not see the same files: refused or made to see, never half seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.isolation import EVERYTHING, can, environment_of_ray, isolated
from tests.faults.test_other_faults import long

ROOT = Path(__file__).parents[2]


@pytest.mark.subprocess
@long
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.skipif(not can(*EVERYTHING), reason="needs mounts of its own")
def test_paths_that_only_one_host_sees(tmp_path: Path) -> None:
    with environment_of_ray(tmp_path, FFSPLIT_CACHE=str(tmp_path / "cache")) as environment:
        done = subprocess.run(
            isolated([sys.executable, "-m", "tests.faults.hosts", str(tmp_path)], flags=EVERYTHING),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["late"]) == 2, "the node that joined got no work"
    assert found["local"].startswith("ConfigError: --out")
    assert "1 of 2 hosts do not see this directory" in found["local"]
    assert found["left"] == []
    assert found["shared"] == "done"
    assert found["bucket"] == "done"
    assert "1 of 2 hosts do not see this model" in done.stderr
