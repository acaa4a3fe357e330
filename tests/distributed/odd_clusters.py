"""Clusters that a command cannot use, one after the other, and what it says of each.

`python -m tests.distributed.odd_clusters FOLDER` must run with a network and processes of its own, which end
with it. It prints one JSON object: exit code and output of a command by what was wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from contextlib import suppress
from pathlib import Path

import psutil

from tests.small_jobs import SmallJob
from tests.tiny_models import save_checkpoint

ROOT = Path(__file__).parents[2]
HEAD = "127.0.0.1:6379"
CODE = """\
import sys
from ffsplit.cli import main
from ffsplit.distributed import ray_cluster
ray_cluster.NODE_WITHIN_S = 2
raise SystemExit(main(sys.argv[1:]))
"""


def start_node(*arguments: str, python: Path | str = sys.executable) -> None:
    """A node whose processes run that Python, and see this package only if it does."""
    command = [str(python), "-m", "ray.scripts.scripts", "start", *arguments, "--num-cpus=1"]
    command += ["--object-store-memory=80000000", "--disable-usage-stats"]
    environment = os.environ if python == sys.executable else without_path()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", env=environment)


def without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def python_with(folder: Path, *paths: Path) -> Path:
    """A Python with all installed packages, but not ours, and with these paths."""
    import torch

    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    installed = Path(torch.__file__).parents[1]
    (site / "all.pth").write_text("\n".join(map(str, [*paths, installed])))
    return folder / "bin" / "python"


def end(name: str) -> None:
    """End every process of that name, and see it gone."""
    found = [each for each in psutil.process_iter() if each.name() == name]
    for each in found:
        each.kill()
    psutil.wait_procs(found)


def wait_for(port: int) -> None:
    """Wait until somebody listens."""
    ends_at = time.monotonic() + 120
    while time.monotonic() < ends_at:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)


def main(folder: Path) -> dict[str, tuple[int, str]]:
    job = SmallJob(folder, save_checkpoint(folder / "model", "bert"))
    found: dict[str, tuple[int, str]] = {}

    def ask(what: str, address: str) -> None:
        given = job.arguments(folder / what, "--address", address)
        done = subprocess.run(
            [sys.executable, "-c", CODE, "compress", *given], capture_output=True, text=True, cwd=folder
        )
        assert done.returncode != 0 or done.stdout, done.stderr
        found[what] = (done.returncode, done.stderr)

    sessions = Path(os.environ["RAY_TMPDIR"]) / "ray"
    ask("nothing runs", "auto")
    sessions.mkdir(parents=True)
    (sessions / "ray_current_cluster").write_text(HEAD)
    ask("left over", "auto")
    (sessions / "ray_current_cluster").unlink()
    start_node("--head", "--port=6379", "--include-dashboard=false", "--ray-client-server-port=10001")
    wait_for(10001)
    ask("client", "ray://127.0.0.1:10001")
    start_node(f"--address={HEAD}", python=python_with(folder / "bare"))
    ask("no package", HEAD)
    older = folder / "older"
    shutil.copytree(ROOT / "ffsplit", older / "ffsplit")
    text = (older / "ffsplit/__init__.py").read_text("utf-8")
    ours = next(line for line in text.splitlines() if line.startswith("__version__ = "))
    (older / "ffsplit/__init__.py").write_text(text.replace(ours, '__version__ = "0.0.1"'), "utf-8")
    end("raylet")
    start_node(f"--address={HEAD}", python=python_with(folder / "old", older))
    ask("another version", HEAD)
    shutil.rmtree(next(sessions.glob("session_2*")))
    ask("no session directory", HEAD)
    end("raylet")
    ask("no node here", HEAD)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
