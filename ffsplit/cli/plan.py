"""The commands about budgets: planning many at once, and measuring what latency budgets need."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ffsplit.cli.job import add_loading_flags

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """The budgets beside --keep, of which one may be given, and the statistics of an earlier run."""
    add = parser.add_argument
    add("--max-bytes", type=int, metavar="N", help="instead of --keep: bytes of all FFNs, at most")
    add("--max-parameters", type=int, metavar="N", help="instead of --keep: of the whole model, at most")
    add(
        "--max-latency-ms",
        type=float,
        metavar="F",
        help="instead of --keep: of a forward pass, at most (experimental)",
    )
    add("--latency-table", metavar="FILE", help="for --max-latency-ms: what ffsplit latency-table wrote")
    add("--stats", metavar="URI", help="an earlier run of this model, whose statistics serve again")


def add_plan_commands(command: AddCommand) -> None:
    plan = command("plan", _plan, "what budgets would give, from an earlier run's statistics alone")
    add = plan.add_argument
    add("uri", help="an artifact, or a run of ffsplit calibrate")
    add("--keep", type=float, nargs="+", default=[], metavar="F")
    add("--max-bytes", type=int, nargs="+", default=[], metavar="N", help="of all FFNs")
    add("--max-parameters", type=int, nargs="+", default=[], metavar="N", help="of the whole model")
    add("--max-latency-ms", type=float, nargs="+", default=[], metavar="F")
    add("--latency-table", metavar="FILE", help="for --max-latency-ms")
    add("--recipe", metavar="NAME|FILE.yaml", help="default: the earlier run's own")
    add("--json", action="store_true", help="print the plans alone, heavy hitters by index")
    table = command("latency-table", _latency_table, "time a model at a dozen FFN widths here (experimental)")
    add = table.add_argument
    add("model", help="a local directory or a hub id")
    add("--out", required=True, metavar="FILE.json")
    add("--batch-size", type=int, default=8, metavar="N", help="rows a forward pass; default: 8")
    add("--num-tokens", type=int, default=128, metavar="N", help="tokens a row; default: 128")
    add("--threads", type=int, default=1, metavar="N", help="default: 1, as runs measure")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--revision", metavar="R", help="of a hub id")
    add_loading_flags(table)


def _plan(parsed: argparse.Namespace) -> int:
    from ffsplit.config import BUDGET_KINDS
    from ffsplit.forecasts import checked_budget, plan_budgets

    table = parsed.latency_table
    budgets = [
        checked_budget(kind, limit, latency_table=table)
        for kind in BUDGET_KINDS
        for limit in getattr(parsed, kind)
    ]
    plans = plan_budgets(parsed.uri, budgets=budgets, recipe=parsed.recipe, latency_table=table)
    if parsed.json:
        print(plans.model_dump_json(indent=2))
    else:
        from ffsplit.cli.tables import print_plans

        print_plans(plans)
    return 0


def _latency_table(parsed: argparse.Namespace) -> int:
    from ffsplit.errors import ConfigError

    for flag in ("batch_size", "num_tokens", "threads"):
        if getattr(parsed, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} must be 1 or more, not {getattr(parsed, flag)}")
    from ffsplit.cli.tables import print_latency_table
    from ffsplit.config import JobConfig
    from ffsplit.measurement.latency_table import check_target, measure_latency_table, write_latency_table
    from ffsplit.profile import ComputeProfile
    from ffsplit.progress import Progress

    config = JobConfig.checked(
        model=parsed.model,
        out=parsed.out,
        device=parsed.device,
        dtype=parsed.dtype,
        threads_per_worker=parsed.threads,
    )
    check_target(parsed.out)
    with Progress.to_stderr() as shown:

        def progress(done: int, total: int) -> None:
            if done == 1:
                shown.start("time", total)
            shown.advance()

        table = measure_latency_table(
            parsed.model,
            shape=(parsed.batch_size, parsed.num_tokens),
            profile=ComputeProfile.resolve(config),
            revision=parsed.revision,
            progress=progress,
        )
    path = write_latency_table(table, parsed.out)
    print_latency_table(table)
    print(f"written to {path}")
    return 0
