"""How fast compressed models run here, beside what else one would pick: writes speed_<hardware>.md.

    PYTHONPATH=. python benchmarks/speed.py [--quick] [--only bert-base decode load] [--device cuda]

Models have random weights: speed depends on shapes alone, and BERT-base is not in any Python package. All
candidates of a table take turns in one process; figures are medians. With --only, the other tables of the
page stay as they are. On a GPU, where models are compiled, it needs torch, transformers and this package's
folder, nothing else.

A CPU's page is made only if the load average is below 1 when it is started, and states it. --quick runs at
any load, and prints the page unless --out is given.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from speed_load import Others, quiet_load
from speed_models import BERTS

ROOT = Path(__file__).resolve().parents[1]


def hardware_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor()


def sections_of(page: Path) -> dict[str, str]:
    """The tables of a page that was written before, by title."""
    parts = page.read_text("utf-8").split("\n## ")[1:] if page.is_file() else []
    return {part.splitlines()[0]: part.partition("\n")[2].strip() for part in parts}


def tables_of(device: str, *, quick: bool) -> dict[str, Callable[[], list[str]]]:
    """The page's tables by title. What the other device's need is not imported."""
    if device == "cuda":
        import speed_gpu as here
    else:
        import speed_tables as here  # type: ignore[no-redef]
    tables: dict[str, Callable[[], list[str]]] = {
        name: partial(here.encoder_table, name, quick=quick) for name in BERTS
    }
    tables["decode"] = partial(here.causal_table, quick=quick)
    if device == "cpu":
        tables["load"] = partial(here.load_table, quick=quick)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs, at any load")
    parser.add_argument("--only", nargs="+", choices=(*BERTS, "decode", "load"), default=[])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--out", type=Path, help="default: benchmarks/speed_<hardware>.md")
    given = parser.parse_args()
    is_timed_here = given.device == "cpu" and not given.quick  # a GPU's host may have compiled before
    load = quiet_load() if is_timed_here else os.getloadavg()[0]
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if given.threads:
        torch.set_num_threads(given.threads)
    tables = tables_of(given.device, quick=given.quick)
    name = hardware_name(given.device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = given.out or ROOT / "benchmarks" / f"speed_{slug}.md"
    options = f" --threads {given.threads}" * bool(given.threads) + " --device cuda" * (
        given.device == "cuda"
    )
    command = f"PYTHONPATH=.:.bench python benchmarks/speed.py{options}" if options else "make bench-speed"
    sections = sections_of(out)
    for title, table in tables.items():
        if given.only and title not in given.only:
            continue
        start, others = time.perf_counter(), Others()
        lines = [*table(), ""]
        lines += [
            f"Threads: {torch.get_num_threads()}; load average before the start: {load:.1f}; meanwhile, "
            f"other processes used {others.mean_cpus():.2f} CPUs."
        ]
        sections[title] = "\n".join(lines)
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        ordered = {each: sections[each] for each in dict.fromkeys((*tables, *sections)) if each in sections}
        page = page_of(ordered, name=name, command=command)
        if not given.quick or given.out is not None:
            out.write_text(page, "utf-8")
        gc.collect()
    print(page if given.quick and given.out is None else out)


def page_of(sections: dict[str, str], *, name: str, command: str) -> str:
    """The whole page, as far as there are tables."""
    lines = [
        f"# Speed on {name}",
        "",
        f"Made by `{command}`: {name}; torch {torch.__version__}, transformers {transformers.__version__}.",
        "Weights are random: speed depends on shapes alone. Candidates of a table take turns in one process;",
        "times are medians, speed-ups medians of the ratios to the dense model (float32 on the CPU, bfloat16",
        "on a GPU) within a round. `rows x tokens`; *reach* is what was asked for. Remarks: speed-notes.md.",
    ]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", section]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
