"""Try FFSplit on a tiny random model of every model type that transformers has.

    python -m benchmarks.families [--out FILE.jsonl] [--quick] [--only PATTERN] [--processes 2]
    python -m benchmarks.families [--out FILE.jsonl] --page docs/models.md

The list of types is transformers' own. `tiny.py` builds them, `oracle.py` tells their FFNs
without the product, `checks.py` compares. `--quick` stops after the FFNs are found; otherwise each
model is compressed twice. A type is tried in a process of its own that may be stopped. Types that stand in
--out are not tried again, unless --again.

Outcomes: right; right in part (FFNs were left out, and the manifest counts them); right, outputs not compared
(no inputs are known); refused, with the sentence; traceback; silently wrong (published, but the manifest
does not know of some FFNs, or the outputs are others); no FFN, refused; not built (this script cannot make
one). After --quick: found, partly found, found others (what the oracle says is no FFN).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.families.page import write_page
from benchmarks.families.workers import Worker


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/families.jsonl"))
    parser.add_argument("--only", default=".", metavar="PATTERN", help="of model types, a regular expression")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="find FFNs, compress nothing")
    parser.add_argument("--again", action="store_true", help="also what stands in --out already")
    parser.add_argument("--page", type=Path, help="write this page of --out, and try nothing")
    parsed = parser.parse_args(arguments)
    if parsed.page:
        write_page(finished(parsed.out), parsed.page)
        return
    from benchmarks.families.tiny import model_types

    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    done = set() if parsed.again else {record["type"] for record in finished(parsed.out)}
    jobs = [job for job in model_types().items() if re.search(parsed.only, job[0]) and job[0] not in done]
    jobs.reverse()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        workers = [
            Worker(Path(folder) / str(index), quick=parsed.quick)
            for index in range(min(parsed.processes, len(jobs)))
        ]
        try:
            while jobs or any(worker.job for worker in workers):
                for worker in workers:
                    record = worker.result() if worker.job else None
                    if record is not None:
                        totals[record["outcome"]] += 1
                        with parsed.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(record) + "\n")
                        why = str(record.get("why", ""))[:150]
                        print(record["type"], record["outcome"], why, sep=" | ", flush=True)
                    if worker.job is None and jobs:
                        worker.give(jobs.pop())
                wait([worker.connection for worker in workers if worker.job], timeout=1)
        finally:
            for worker in workers:
                worker.stop()
    print(dict(totals))


def finished(path: Path) -> list[dict[str, Any]]:
    """The records of earlier calls; of a type tried twice the last."""
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return list({record["type"]: record for record in records}.values())


if __name__ == "__main__":
    main()
