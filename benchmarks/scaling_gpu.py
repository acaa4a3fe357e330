"""How a run's stages spread over the GPUs of one host, into benchmarks/scaling.md.

    python -m benchmarks.scaling_gpu MODEL --calibration TEXT --gpus 1 2 4
    python -m benchmarks.scaling_gpu --page-only      write the page from scaling_gpu.json again

Each number of GPUs is a run of its own through Ray, one worker per GPU, and starts from nothing. The seconds
are those of the manifest's stages: they contain the start of the stage's workers, which load the model.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.scaling_page import GPURun, with_gpu_section
from ffsplit.machine import describe_environment

RECORD = Path(__file__).with_name("scaling_gpu.json")
PAGE = Path(__file__).with_name("scaling.md")
PLACED = re.compile(r"^\w+: a worker on .*", re.MULTILINE)


def run_on(num_gpus: int, parsed: argparse.Namespace, folder: Path) -> GPURun:
    """One run through Ray with so many workers, each on a GPU of its own."""
    out = folder / f"on-{num_gpus}"
    command = [sys.executable, "-m", "ffsplit.cli", "compress", parsed.model, "--out", str(out)]
    command += ["--workers", str(num_gpus), "--gpus-per-worker", "1", "--keep", str(parsed.keep)]
    command += ["--recipe", parsed.recipe, "--calibration", parsed.calibration]
    command += [] if parsed.samples is None else ["--samples", str(parsed.samples)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    manifest = json.loads(next(out.glob("*/*/manifest.json")).read_text("utf-8"))
    stages = {stage["name"]: stage["wall_s"] for stage in manifest["stages"]}
    placed = sorted(PLACED.findall(done.stderr))
    print(num_gpus, f"{seconds:.1f} s", stages, *placed, sep="\n  ", flush=True)
    return GPURun(num_gpus, stages, seconds, placed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--about", default="", help="what the model is, for the page")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--page-only", action="store_true")
    parsed = parser.parse_args()
    if not parsed.page_only:
        with tempfile.TemporaryDirectory(prefix="ffsplit-bench-") as name:
            runs = [run_on(count, parsed, Path(name)) for count in parsed.gpus]
        hardware = describe_environment()
        about = (
            f"{hardware.hardware.get('gpu', 'no GPU')}, torch {hardware.versions['torch']}; {parsed.about}"
        )
        found = {"about": about, "runs": [each._asdict() for each in runs]}
        parsed.record.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    parsed.page.write_text(with_gpu_section(parsed.page.read_text("utf-8"), parsed.record), "utf-8")
    print(parsed.page)


if __name__ == "__main__":
    main()
