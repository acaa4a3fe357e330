"""What each command does. Heavy imports are inside functions, so that a command loads only what it needs."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit import streams
from ffsplit.cli.overview import listed_recipes
from ffsplit.cli.store_commands import gc, list_runs, pin, promote, pull, push, share
from ffsplit.config import BUDGET_KINDS, JobConfig, flag_of
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError, did_you_mean
from ffsplit.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, REFUSED
from ffsplit.recipes import shipped_recipes
from ffsplit.store.entries import check_absolute

if TYPE_CHECKING:
    from ffsplit.store.commits import Kind
    from ffsplit.store.manifest import Manifest
    from ffsplit.zoo.zoo_file import Zoo


def compress(parsed: argparse.Namespace) -> int:
    config = job_config(parsed)
    if parsed.dry_run:
        return _dry_run(parsed, config, kind="model")

    from ffsplit.measurement.gates import refusal
    from ffsplit.run.driver import run_to_end

    finished = run_to_end(config, sign_key=_sign_key(parsed))
    refused = finished.state == "refused"
    _show(parsed, finished.manifest, refused_report=finished.report if refused else None)
    if not refused:
        return DONE
    streams.note(f"ffsplit: {refusal(finished.manifest.gates)}")
    return REFUSED


def calibrate(parsed: argparse.Namespace) -> int:
    config = job_config(parsed)
    if parsed.dry_run:
        return _dry_run(parsed, config, kind="statistics")

    from ffsplit.run.driver import run_to_end

    _show(parsed, run_to_end(config, kind="statistics", sign_key=_sign_key(parsed)).manifest)
    return DONE


def job_config(parsed: argparse.Namespace) -> JobConfig:
    """The job that the flags describe. Raises ConfigError."""
    fields = {name: value for name, value in vars(parsed).items() if name in JobConfig.model_fields}
    return JobConfig.of_flags(**{name: value for name, value in fields.items() if value is not None})


def _dry_run(parsed: argparse.Namespace, config: JobConfig, *, kind: Kind) -> int:
    """Print what a run would need, then raise ConfigError if it cannot be done."""
    from ffsplit.run.checks import check_rows, default_text, far_from_evaluation
    from ffsplit.run.documents import rounding_note
    from ffsplit.run.job import prepare

    with _working("reading the model"):
        run = prepare(config, kind=kind)
        check_rows(run)
        needs = run.needs
    if parsed.json:
        print(needs.model_dump_json(indent=2))
    else:
        from ffsplit.cli.columns import print_sentence
        from ffsplit.cli.tables import print_needs

        print_needs(needs, asked=config.workers if config.runner == "ray" else None)
        for note in (rounding_note(run), default_text(run), *far_from_evaluation(run)):
            if note is not None:
                print_sentence(note)
    needs.check()
    return DONE


@contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner on a terminal's stderr."""
    from ffsplit.progress import Progress

    with Progress.to_user() as shown, shown.working(what):
        yield


def _sign_key(parsed: argparse.Namespace) -> Path | None:
    return None if parsed.sign_key is None else user_path(parsed.sign_key)


def _show(parsed: argparse.Namespace, manifest: Manifest, *, refused_report: str | None = None) -> None:
    if parsed.json:
        print(manifest.to_json(), end="")
        return
    from ffsplit.cli.tables import print_manifest

    print_manifest(manifest, out=parsed.out, refused_report=refused_report)


def checked_multiple_flag(parsed: argparse.Namespace) -> int | None:
    """--width-multiple, checked like a job's."""
    fields = {"model": "-", "out": "-", "width_multiple": parsed.width_multiple}
    return JobConfig.of_flags(**fields).width_multiple


def inspect(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.inspection import print_inspection
    from ffsplit.forecasts import inspect as inspect_model

    multiple = checked_multiple_flag(parsed)
    with _working("reading the model"):
        found = inspect_model(parsed.model, recipe=parsed.recipe or "fast", width_multiple=multiple)
    print_inspection(found)
    return DONE


def plan(parsed: argparse.Namespace) -> int:
    from ffsplit.forecasts import checked_budget
    from ffsplit.forecasts import plan as plan_budgets

    table = parsed.latency_table
    budgets = [
        checked_budget(kind, limit, latency_table=table)
        for kind in BUDGET_KINDS
        for limit in vars(parsed)[kind]
    ]
    multiple = checked_multiple_flag(parsed)
    with _working("reading the statistics"):
        plans = plan_budgets(
            parsed.uri,
            budgets=budgets,
            recipe=parsed.recipe,
            latency_table=table,
            width_multiple=multiple,
        )
    if parsed.json:
        print(plans.model_dump_json(indent=2))
    else:
        from ffsplit.cli.tables import print_plans

        print_plans(plans)
    return DONE


def latency_table(parsed: argparse.Namespace) -> int:
    for name in ("batch_size", "num_tokens", "threads"):
        if vars(parsed)[name] < 1:
            raise ConfigError(f"{flag_of(name)} must be 1 or more, not {vars(parsed)[name]}")
    from ffsplit.cli.tables import print_latency_table
    from ffsplit.compute_profile import ComputeProfile
    from ffsplit.measurement.latency_table import check_target, measure_latency_table, write_latency_table
    from ffsplit.progress import Progress

    config = JobConfig.of_flags(
        model=parsed.model,
        out=parsed.out,
        device=parsed.device or "auto",
        dtype=parsed.dtype or "auto",
        threads_per_worker=parsed.threads,
    )
    check_target(parsed.out)
    with Progress.to_user() as shown:

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
    return DONE


def verify(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.columns import print_sentence
    from ffsplit.store.pull import verify

    report = verify(parsed.uri)
    for problem in report.problems:
        print(problem)
    verdict = "verified" if report.ok else f"INVALID, problems: {len(report.problems)}"
    print_sentence(f"{report.location}: {report.num_files} files, {report.total_bytes:,} bytes, {verdict}")
    return DONE if report.ok else FAILED


def report(parsed: argparse.Namespace) -> int:
    from ffsplit.run.documents import render_published

    print(render_published(parsed.uri, out=parsed.out))
    return DONE


def benchmark(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.tables import print_benchmark
    from ffsplit.measurement.benchmark import Settings, benchmark, publish

    settings = Settings(
        batch_sizes=tuple(parsed.batch_sizes),
        lengths=tuple(parsed.lengths),
        pairs=parsed.pairs,
        new_tokens=parsed.new_tokens,
        device=parsed.device or "auto",
        dtype=parsed.dtype or "auto",
        threads=parsed.threads,
        memory=not parsed.no_memory,
    )
    record = benchmark(parsed.uri, against=parsed.against, settings=settings)
    if parsed.json:
        print(record.model_dump_json(indent=2))
    else:
        print_benchmark(record)
    if not parsed.no_publish and (key := publish(parsed.uri, record)) and not parsed.json:
        print(f"appended: {key}")
    return DONE


def export(parsed: argparse.Namespace) -> int:
    from ffsplit.runtime.export import export

    out = user_path(parsed.out)
    with _working("exporting"):
        written = export(
            parsed.uri,
            format=parsed.format,
            out=out,
            scheme=parsed.scheme,
            optimize=parsed.optimize,
            quantize=parsed.quantize,
        )
    print(written)
    return DONE


def submit(parsed: argparse.Namespace) -> int:
    working_dir = None if parsed.working_dir is None else user_path(parsed.working_dir)
    if working_dir is not None and not working_dir.is_dir():
        raise ConfigError(f"--working-dir {parsed.working_dir} is not a directory")
    from ffsplit.cli.entry import DEFAULT_ADDRESS, build_parser
    from ffsplit.cli.submission import submit

    checked = build_parser().parse_args([parsed.command, *parsed.arguments])

    return submit(
        parsed.command,
        parsed.arguments,
        checked,
        address=parsed.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS,
        working_dir=working_dir,
        stop_on_interrupt=parsed.stop_on_interrupt,
    )


def zoo(parsed: argparse.Namespace) -> int:
    from ffsplit.zoo.zoo_file import load_zoo

    zoo = load_zoo(parsed.file)
    if parsed.workers is not None and parsed.workers < 1:
        raise ConfigError(f"--workers should be greater than or equal to 1, not {parsed.workers}")
    if parsed.in_job:
        check_absolute(zoo.destination)

    if parsed.dry_run:
        return _zoo_dry_run(parsed, zoo)

    from ffsplit.zoo.run import run_zoo

    try:
        batch = run_zoo(zoo, address=parsed.address, runner=parsed.runner or "ray", workers=parsed.workers)
    except KeyboardInterrupt:
        streams.note("ffsplit: interrupted; published models stay, and the next batch skips them")
        return INTERRUPTED
    if parsed.json:
        print(batch.model_dump_json(indent=2))
    else:
        from ffsplit.cli.batch_lines import print_batch

        print_batch(batch, destination=zoo.destination)
    return batch.exit_code


def _zoo_dry_run(parsed: argparse.Namespace, zoo: Zoo) -> int:
    from ffsplit.zoo.forecast import forecast
    from ffsplit.zoo.revisions import at_commits

    if zoo.on_event is not None:
        zoo.on_event.check()
    if parsed.runner:
        jobs = [each.job.model_copy(update={"runner": parsed.runner}) for each in zoo.models]
        models = [each.model_copy(update={"job": job}) for each, job in zip(zoo.models, jobs, strict=True)]
        zoo = zoo.model_copy(update={"models": tuple(models)})
    found = forecast(*at_commits(zoo, streams.note), workers=parsed.workers)
    if parsed.json:
        print(found.model_dump_json(indent=2))
    else:
        from ffsplit.cli.batch_lines import print_forecast

        print_forecast(found)
    return MISTAKE if found.count("cannot run") else DONE


def recipes(parsed: argparse.Namespace) -> int:
    shipped = shipped_recipes()
    if parsed.name is None:
        print(listed_recipes(shipped, width=shutil.get_terminal_size().columns))
        return DONE
    if parsed.name not in shipped:
        hint = did_you_mean(parsed.name, shipped) or f"; shipped are {', '.join(shipped)}"
        raise ConfigError(f"no shipped recipe is named {parsed.name!r}{hint}")
    print(shipped[parsed.name], end="")
    return DONE


def completion(parsed: argparse.Namespace) -> int:
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise ConfigError(
            "argcomplete is not installed: pip install argcomplete, here and where you use ffsplit"
        ) from None
    print(shellcode(["ffsplit"], shell=parsed.shell))
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "compress": compress,
    "calibrate": calibrate,
    "inspect": inspect,
    "plan": plan,
    "recipes": recipes,
    "latency-table": latency_table,
    "verify": verify,
    "report": report,
    "benchmark": benchmark,
    "export": export,
    "pull": pull,
    "push": push,
    "share": share,
    "list": list_runs,
    "promote": promote,
    "pin": pin,
    "gc": gc,
    "zoo": zoo,
    "submit": submit,
    "completion": completion,
}
