"""A file of 2 GB goes up and comes down in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.s3, pytest.mark.slow]

SIZE_BYTES = 2 << 30
LIMIT_BYTES = 300 << 20
SCRIPT = """\
import json, re, sys
from pathlib import Path
from ffsplit.store.artifact import locate
from ffsplit.store.publish import Upload
from ffsplit.store.pull import download
from ffsplit.store.store import open_store
from tests.store.attempts import ATTEMPT, RUN_KEY, make_manifest

def peak_bytes():
    # of this program alone: what getrusage tells includes the process it was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

uri, folder = sys.argv[1], Path(sys.argv[2])
store = open_store(uri)
store.put_bytes("small", b"x")
assert store.get_bytes("small") == b"x"
base, attempt = peak_bytes(), folder / "attempt"
with Upload(store, run_key=RUN_KEY, attempt=ATTEMPT) as upload:
    manifest = make_manifest(run_key=RUN_KEY, attempt=ATTEMPT, files=upload.add(attempt))
    (attempt / "manifest.json").write_text(manifest.to_json())
    upload.commit(attempt, kind="model", move_latest=True)
up = peak_bytes() - base
download(locate(uri), directory=folder / "copy")
print(json.dumps({"base": base, "up": up, "down": peak_bytes() - base}))
"""


@pytest.mark.subprocess
def test_two_gigabytes_in_bounded_memory(uri: str, tmp_path: Path) -> None:
    (tmp_path / "attempt").mkdir()
    with (tmp_path / "attempt" / "model.safetensors").open("wb") as file:
        for number in range(SIZE_BYTES >> 24):
            file.write(number.to_bytes(4, "big") * (1 << 22))
    command = [sys.executable, "-c", SCRIPT, uri, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout)
    print({name: f"{value / 2**20:.0f} MiB" for name, value in peaks.items()})
    assert peaks["up"] < LIMIT_BYTES and peaks["down"] < LIMIT_BYTES
