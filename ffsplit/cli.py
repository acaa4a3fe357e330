"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ffsplit import __version__, logs
from ffsplit.artifacts.paths import check_absolute
from ffsplit.artifacts.units import parse_size
from ffsplit.cli_batch import add_batch_commands
from ffsplit.cli_plan import add_budget_flags, add_plan_commands
from ffsplit.cli_store import add_store_commands
from ffsplit.errors import ConfigError
from ffsplit.exit_codes import DESCRIPTION, DONE, REFUSED, exit_code_of

if TYPE_CHECKING:
    from ffsplit.artifacts.commits import Kind
    from ffsplit.artifacts.manifest import Manifest
    from ffsplit.config import JobConfig


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
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    compress = command("compress", _compress, "calibrate, split, compress, measure and publish a model")
    _add_job_flags(compress)
    add_budget_flags(compress)
    _add_judging_flags(compress)
    compress.add_argument(
        "--healing-workers",
        type=int,
        metavar="N",
        help="that share every step of healing, through Ray Train; default: 1",
    )
    _add_job_flags(command("calibrate", _calibrate, "collect and publish neuron statistics alone"))
    verify = command("verify", _verify, "recompute every digest of an artifact")
    verify.add_argument("uri")
    report = command("report", _report, "write the HTML report of an artifact")
    report.add_argument("uri")
    report.add_argument("--out", required=True, metavar="FILE")
    benchmark = command("benchmark", _benchmark, "time an artifact and its original, in turn")
    benchmark.add_argument("uri", metavar="URI_OR_MODEL")
    benchmark.add_argument("--against", metavar="MODEL", help="default: the model the artifact was made from")
    inspect = command("inspect", _inspect, "show a model's FFNs and what budgets would give")
    inspect.add_argument("model")
    inspect.add_argument("--recipe", default="fast", metavar="NAME|FILE.yaml")
    add_plan_commands(command)
    add_store_commands(command)
    add_batch_commands(command, parse=parser.parse_args)
    return parser


def _add_job_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a local directory or a hub id")
    add("--out", required=True, metavar="URI", help="a directory or s3://bucket/prefix")
    add("--recipe", default="fast", metavar="NAME|FILE.yaml", help="default: fast")
    add("--keep", type=float, metavar="F", help="fraction of the FFN elements to keep, in (0, 1]")
    add(
        "--calibration",
        action="append",
        metavar="SPEC",
        help="file.txt, file.jsonl#field, file.csv#column, file.tsv#column, file.parquet#column, "
        "hf:dataset[:config]#column@split or builtin:pydoc (the default); may be repeated",
    )
    add("--samples", type=int, metavar="N", help="rows of calibration text")
    add("--max-length", type=int, metavar="N", help="tokens a row is cut to")
    add("--workers", type=int, metavar="N", help="default: one per CPU core of the cluster")
    add("--gpus-per-worker", type=float, default=0.0, metavar="F", help="fractions are allowed")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="to compute in")
    add("--address", metavar="RAY", help="a Ray cluster; default: RAY_ADDRESS, or one started on the spot")
    add("--runner", default="ray", choices=("ray", "serial"))
    add("--revision", metavar="R", help="of a hub id")
    add("--seed", type=int, metavar="N", help="default: 0")
    add(
        "--block-by-block",
        action="store_true",
        help="hold one block of the model in memory at a time; default: where the model does not fit",
    )
    add(
        "--memory-per-worker",
        type=partial(parse_size, name="--memory-per-worker"),
        metavar="SIZE",
        help="as in 6GB; default: a worker's share of this machine's",
    )
    add("--dry-run", action="store_true", help="say what the run would need, and stop")
    add("--fresh", action="store_true", help="run again even when this run is committed already")
    add("--sign-key", metavar="KEY", help="sign the manifest with this EC private key (PEM)")
    add("--json", action="store_true", help="print the manifest alone on stdout")
    add("--log-format", choices=("text", "json"), help="of stderr; default: FFSPLIT_LOG, or text")


def _add_judging_flags(parser: argparse.ArgumentParser) -> None:
    """How a result is scored, and what it must reach to be published."""
    parser.add_argument(
        "--eval",
        action="append",
        metavar="SPEC",
        help="score both models: sts:file.csv[#first,second,score], classification:file.tsv[#text,label], "
        "perplexity:file.txt or lm-eval:task[,task]; may be repeated",
    )
    parser.add_argument(
        "--gate",
        action="append",
        metavar="SPEC",
        help="publish only a result with, for example, 'fidelity >= 0.98', 'sts drop <= 0.5', "
        "'speedup@8x128 >= 1.3' or 'size reduction >= 20%%'; may be repeated",
    )
    parser.add_argument(
        "--require-speedup",
        type=float,
        metavar="F",
        help="publish only a result that is so many times as fast here, at every shape that is timed",
    )


def main(arguments: Sequence[str] | None = None, *, in_job: bool = False) -> int:
    """Run one command and return its exit code.

    `in_job` refuses a relative output, which would go with the job's working directory.
    """

    def run() -> int:
        parsed = build_parser().parse_args(arguments)
        parsed.in_job = in_job
        if log_format := vars(parsed).get("log_format"):
            logs.ask_for(log_format)
        target: str | None = vars(parsed).get("out", vars(parsed).get("directory"))
        if in_job and target:
            check_absolute(target)
        code: int = parsed.run(parsed)
        return code

    return exit_code_of(run)


def _job_config(parsed: argparse.Namespace) -> JobConfig:
    """The job that the flags describe. Raises ConfigError."""
    from ffsplit.config import JobConfig

    fields = {name: value for name, value in vars(parsed).items() if name in JobConfig.model_fields}
    return JobConfig.checked(**{name: value for name, value in fields.items() if value is not None})


def _compress(parsed: argparse.Namespace) -> int:
    config = _job_config(parsed)
    if parsed.dry_run:
        return _dry_run(parsed, config, kind="model")

    from ffsplit.gates import refusal
    from ffsplit.pipeline import compress_judged

    finished = compress_judged(config, sign_key=_sign_key(parsed))
    refused = finished.state == "refused"
    _show(parsed, finished.manifest, refused_report=finished.report if refused else None)
    if not refused:
        return DONE
    print(f"ffsplit: {refusal(finished.manifest.gates)}", file=sys.stderr)
    return REFUSED


def _calibrate(parsed: argparse.Namespace) -> int:
    config = _job_config(parsed)
    if parsed.dry_run:
        return _dry_run(parsed, config, kind="statistics")

    from ffsplit.pipeline import calibrate

    _show(parsed, calibrate(config, sign_key=_sign_key(parsed)))
    return 0


def _dry_run(parsed: argparse.Namespace, config: JobConfig, *, kind: Kind) -> int:
    """Say what a run would need. Raises ConfigError for what cannot be done, after it is said."""
    from ffsplit.prepare import preflight

    flight = preflight(config, kind=kind)
    if parsed.json:
        print(flight.model_dump_json(indent=2))
    else:
        from ffsplit.summary import print_preflight

        print_preflight(flight)
    flight.check()
    return 0


def _sign_key(parsed: argparse.Namespace) -> Path | None:
    return None if parsed.sign_key is None else Path(parsed.sign_key).expanduser()


def _show(parsed: argparse.Namespace, manifest: Manifest, *, refused_report: str | None = None) -> None:
    if parsed.json:
        print(manifest.to_json(), end="")
        return
    from ffsplit.summary import print_manifest

    print_manifest(manifest, out=parsed.out, refused_report=refused_report)


def _verify(parsed: argparse.Namespace) -> int:
    from ffsplit.artifacts.verify import verify

    report = verify(parsed.uri)
    for problem in report.problems:
        print(problem)
    verdict = "verified" if report.ok else f"NOT whole, {len(report.problems)} problems"
    print(f"{report.location}: {report.num_files} files, {report.total_bytes:,} bytes, {verdict}")
    return 0 if report.ok else 1


def _report(parsed: argparse.Namespace) -> int:
    from ffsplit.publication import render_published

    print(render_published(parsed.uri, out=parsed.out))
    return 0


def _benchmark(parsed: argparse.Namespace) -> int:
    from ffsplit.measurement.benchmark import benchmark
    from ffsplit.summary import print_timings

    print_timings(benchmark(parsed.uri, against=parsed.against))
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    from ffsplit.inspection import inspect_model
    from ffsplit.summary import print_inspection

    print_inspection(inspect_model(parsed.model, recipe=parsed.recipe))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
