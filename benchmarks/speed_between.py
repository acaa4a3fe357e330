"""The same model by this tree's code and by another checkout's, in turn: what a change of kernels costs.

    git worktree add /tmp/before main
    python benchmarks/speed_between.py /tmp/before --model bert_int8 --rounds 30

Two processes answer in turn, so that other work on the machine meets both alike. Printed per shape: the
median of the ratios of each round, this tree's time over the other's, and the quartiles of those.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
SHAPES = "1x128", "8x128", "32x128"


def answer(name: str, argument: str) -> None:
    """Be one of the two: time a forward pass per line of standard input, a shape, in ms."""
    import speed_models
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = getattr(speed_models, name)(argument)
    with torch.inference_mode():
        for line in sys.stdin:
            rows, tokens = map(int, line.split("x"))
            ids = torch.randint(5, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
            start = time.perf_counter()
            model(input_ids=ids)
            print((time.perf_counter() - start) * 1e3, flush=True)


def started(tree: Path, name: str, argument: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--answer", "--model", name, "--size", argument]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree
    )


def asked(process: subprocess.Popen[str], shape: str) -> float:
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None
    _write(stdin, shape)
    return float(stdout.readline())


def _write(stdin: IO[str], line: str) -> None:
    stdin.write(f"{line}\n")
    stdin.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--model", default="bert_int8", help="a function of speed_models")
    parser.add_argument("--size", default="bert-base", help="its argument")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxTOKENS")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer:
        return answer(given.model, given.size)
    before, after = (started(tree, given.model, given.size) for tree in (given.before, HERE.parent))
    for shape in given.shapes:
        pairs = []
        for count in range(given.rounds + 2):
            order = (before, after) if count % 2 else (after, before)
            times = {process.pid: asked(process, shape) for process in order}
            pairs.append((times[before.pid], times[after.pid]))
        pairs = pairs[2:]
        low, middle, high = statistics.quantiles((after / before for before, after in pairs), n=4)
        old, new = (statistics.median(each) for each in zip(*pairs, strict=True))
        load = os.getloadavg()[0]
        print(
            f"{shape}: {middle:.2f} ({low:.2f} to {high:.2f}); {old:.1f} ms before, {new:.1f} ms after, "
            f"load {load:.1f}",
            flush=True,
        )
    for process in (before, after):
        process.communicate()


if __name__ == "__main__":
    main()
