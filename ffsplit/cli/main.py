"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ffsplit import __version__, logs, streams
from ffsplit.cli.batch import add_batch_commands
from ffsplit.cli.job import add_job_flags, add_judging_flags, add_loading_flags
from ffsplit.cli.plan import add_budget_flags, add_plan_commands
from ffsplit.cli.run import add_run_commands
from ffsplit.cli.store import add_store_commands
from ffsplit.directories import user_path
from ffsplit.errors import ConfigError
from ffsplit.exit_codes import DESCRIPTION, DONE, REFUSED, checked_output, exit_code_of, show_tracebacks
from ffsplit.models.load_options import attending, trusting
from ffsplit.store.entries import check_absolute

if TYPE_CHECKING:
    from ffsplit.config import JobConfig
    from ffsplit.store.commits import Kind
    from ffsplit.store.manifest import Manifest


PRINTING = ("benchmark", "inspect", "list", "plan", "share", "verify")
"""Commands whose result is what they print, and nothing else."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ffsplit",
        description="Compress transformer models by splitting their feed-forward networks.",
        epilog=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ffsplit {__version__}")
    _add_debug_flag(parser)
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, title=name)
        _add_debug_flag(added)
        return added

    compress = command("compress", _compress, "calibrate, split, compress, measure and publish a model")
    add_job_flags(compress)
    add_budget_flags(compress)
    add_judging_flags(compress)
    compress.add_argument(
        "--healing-workers",
        type=int,
        metavar="N",
        help="that share every step of healing, through Ray Train; default: 1. Experimental on GPUs",
    )
    add_job_flags(command("calibrate", _calibrate, "collect and publish neuron statistics alone"))
    verify = command("verify", _verify, "recompute every digest of an artifact")
    verify.add_argument("uri")
    report = command("report", _report, "write the HTML report of an artifact")
    report.add_argument("uri")
    report.add_argument("--out", required=True, metavar="FILE")
    add_run_commands(command)
    inspect = command("inspect", _inspect, "show a model's FFNs and what budgets would give")
    inspect.add_argument("model")
    inspect.add_argument("--recipe", default="fast", metavar="NAME|FILE.yaml")
    add_loading_flags(inspect)
    add_plan_commands(command)
    add_store_commands(command)
    add_batch_commands(command, parse=parser.parse_args)
    return parser


def _add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """Before the command's name or after it."""
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the traceback of whatever fails",
    )


def main(arguments: Sequence[str] | None = None, *, in_job: bool = False) -> int:
    """Run one command and return its exit code.

    `in_job` refuses a relative output, which would go with the job's working directory.
    """

    def run() -> int:
        try:
            parsed = build_parser().parse_args(arguments)
        except SystemExit as printed:  # --help, --version
            return checked_output(int(printed.code or DONE), is_result=True)
        parsed.in_job = in_job
        if "debug" in parsed:
            show_tracebacks()
        if log_format := vars(parsed).get("log_format"):
            logs.ask_for(log_format)
        target: str | None = vars(parsed).get("out", vars(parsed).get("directory"))
        if in_job and target:
            check_absolute(target)
        attention = getattr(parsed, "attn_implementation", None)
        with trusting(getattr(parsed, "trust_remote_code", False)), attending(attention):
            code: int = parsed.run(parsed)
        return checked_output(code, is_result=_prints_its_result(parsed))

    return exit_code_of(run)


def _prints_its_result(parsed: argparse.Namespace) -> bool:
    """Whether a command is for what it prints; else it leaves something, and prints about it."""
    asked = vars(parsed)
    if parsed.title == "pull":
        return parsed.directory is None  # prints where in the cache it is
    if parsed.title == "gc":
        return not parsed.delete
    return parsed.title in PRINTING or bool(asked.get("json") or asked.get("dry_run"))


def _job_config(parsed: argparse.Namespace) -> JobConfig:
    """The job that the flags describe. Raises ConfigError."""
    from ffsplit.config import JobConfig

    fields = {name: value for name, value in vars(parsed).items() if name in JobConfig.model_fields}
    return JobConfig.checked(**{name: value for name, value in fields.items() if value is not None})


def _compress(parsed: argparse.Namespace) -> int:
    config = _job_config(parsed)
    if parsed.dry_run:
        return _dry_run(parsed, config, kind="model")

    from ffsplit.measurement.gates import refusal
    from ffsplit.run.driver import compress_judged

    finished = compress_judged(config, sign_key=_sign_key(parsed))
    refused = finished.state == "refused"
    _show(parsed, finished.manifest, refused_report=finished.report if refused else None)
    if not refused:
        return DONE
    streams.note(f"ffsplit: {refusal(finished.manifest.gates)}")
    return REFUSED


def _calibrate(parsed: argparse.Namespace) -> int:
    config = _job_config(parsed)
    if parsed.dry_run:
        return _dry_run(parsed, config, kind="statistics")

    from ffsplit.run.driver import calibrate

    _show(parsed, calibrate(config, sign_key=_sign_key(parsed)))
    return 0


def _dry_run(parsed: argparse.Namespace, config: JobConfig, *, kind: Kind) -> int:
    """Say what a run would need. Raises ConfigError for what cannot be done, after it is said."""
    from ffsplit.run.checks import check_rows
    from ffsplit.run.job import prepare

    run = prepare(config, kind=kind)
    check_rows(run)
    needs = run.needs
    if parsed.json:
        print(needs.model_dump_json(indent=2))
    else:
        from ffsplit.cli.tables import print_needs

        print_needs(needs, asked=config.workers if config.runner == "ray" else None)
    needs.check()
    return 0


def _sign_key(parsed: argparse.Namespace) -> Path | None:
    return None if parsed.sign_key is None else user_path(parsed.sign_key)


def _show(parsed: argparse.Namespace, manifest: Manifest, *, refused_report: str | None = None) -> None:
    if parsed.json:
        print(manifest.to_json(), end="")
        return
    from ffsplit.cli.tables import print_manifest

    print_manifest(manifest, out=parsed.out, refused_report=refused_report)


def _verify(parsed: argparse.Namespace) -> int:
    from ffsplit.store.pull import verify

    report = verify(parsed.uri)
    for problem in report.problems:
        print(problem)
    verdict = "verified" if report.ok else f"NOT whole, {len(report.problems)} problems"
    print(f"{report.location}: {report.num_files} files, {report.total_bytes:,} bytes, {verdict}")
    return 0 if report.ok else 1


def _report(parsed: argparse.Namespace) -> int:
    from ffsplit.run.documents import render_published

    print(render_published(parsed.uri, out=parsed.out))
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.tables import print_inspection
    from ffsplit.forecasts import inspect_model

    print_inspection(inspect_model(parsed.model, recipe=parsed.recipe))
    return 0
