"""The command line: every command and its flags. What they do is in `commands.py`."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from ffsplit import __version__, logs
from ffsplit.config import Flag, JobConfig, flag_of, parse_size
from ffsplit.errors import ConfigError
from ffsplit.exit_codes import DESCRIPTION, DONE, checked_output, exit_code_of, show_tracebacks
from ffsplit.models.load_options import attending, trusting
from ffsplit.store.entries import check_absolute

PRINTING = ("benchmark", "inspect", "list", "plan", "share", "verify")
"""Commands whose only result is what they print."""
SUBMITTED = ("compress", "calibrate", "zoo", "benchmark", "pull")
"""Commands that can run as a job on a cluster."""
LOADING = ("attn_implementation", "trust_remote_code")
"""Fields of JobConfig for loading models. Every command that loads one has them."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"

Command = Callable[[str, str], argparse.ArgumentParser]
"""Adds a command, from its name and description."""


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main(arguments: Sequence[str] | None = None, *, in_job: bool = False) -> int:
    """Run one command and return its exit code.

    `in_job` refuses a relative output, which would be lost with the job's working directory.
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
        with trusting(bool(getattr(parsed, "trust_remote_code", False))), attending(attention):
            from ffsplit.cli.commands import COMMANDS

            code = COMMANDS[parsed.title](parsed)
        return checked_output(code, is_result=_prints_its_result(parsed))

    return exit_code_of(run)


def _prints_its_result(parsed: argparse.Namespace) -> bool:
    """Whether a command's result is what it prints, rather than files that it writes."""
    asked = vars(parsed)
    if parsed.title == "pull":
        return parsed.directory is None  # prints the directory in the cache
    if parsed.title == "gc":
        return not parsed.delete
    return parsed.title in PRINTING or bool(asked.get("json") or asked.get("dry_run"))


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

    def command(name: str, about: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(title=name)
        _add_debug_flag(added)
        return added

    _add_job_commands(command)
    _add_planning_commands(command)
    _add_result_commands(command)
    _add_store_commands(command)
    _add_batch_commands(command)
    return parser


def _add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """The flag works before the command's name and after it."""
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the traceback of an error",
    )


def _add_fields(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options for fields of JobConfig, from their types and Flags."""
    for name in names:
        field = JobConfig.model_fields[name]
        flag = next(each for each in field.metadata if isinstance(each, Flag))
        options: dict[str, Any] = {"help": (field.description or "").replace("%", "%%"), "default": None}
        kind = _kind_of(field.annotation)
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["metavar"] = flag.metavar
            if get_origin(kind) is tuple:
                options["action"] = "append"
            elif flag.is_size:
                options["type"] = partial(parse_size, name=flag_of(name))
            elif kind is not str:
                options["type"] = kind
        parser.add_argument(flag_of(name), required=field.is_required(), **options)


def _kind_of(annotation: Any) -> Any:
    """The type of a field, without None."""
    if get_origin(annotation) in (types.UnionType, Union):
        (annotation,) = (each for each in get_args(annotation) if each is not types.NoneType)
    return annotation


def _add_job_commands(command: Command) -> None:
    flags = {name: each for name, field in JobConfig.model_fields.items() for each in field.metadata}
    flags = {name: each for name, each in flags.items() if isinstance(each, Flag)}
    compress = command("compress", "calibrate, split, compress, measure and publish a model")
    calibrate = command("calibrate", "collect and publish neuron statistics alone")
    for parser in (compress, calibrate):
        add = parser.add_argument
        add("model", help=JobConfig.model_fields["model"].description)
        shown = [name for name, flag in flags.items() if parser is compress or not flag.compress_only]
        _add_fields(parser, *shown)
        add("--dry-run", action="store_true", help="print what the run would need, and stop")
        add("--sign-key", metavar="KEY", help="sign the manifest with this EC private key (PEM)")
        add("--json", action="store_true", help="print only the manifest on stdout")
        add("--log-format", choices=("text", "json"), help="format of stderr; default: FFSPLIT_LOG, or text")


def _add_planning_commands(command: Command) -> None:
    inspect = command("inspect", "show a model's FFNs and what each budget would give")
    inspect.add_argument("model")
    inspect.add_argument("--recipe", default="fast", metavar="NAME|FILE.yaml")
    _add_fields(inspect, "width_multiple", *LOADING)
    plan = command("plan", "forecast budgets from an earlier run's statistics, without a run")
    add = plan.add_argument
    add("uri", help="an artifact, or a run of ffsplit calibrate")
    add("--keep", type=float, nargs="+", default=[], metavar="F")
    add("--max-bytes", type=int, nargs="+", default=[], metavar="N", help="maximum for all FFNs")
    add("--max-parameters", type=int, nargs="+", default=[], metavar="N", help="maximum for the whole model")
    add("--max-latency-ms", type=float, nargs="+", default=[], metavar="F")
    add("--latency-table", metavar="FILE", help="for --max-latency-ms")
    add("--recipe", metavar="NAME|FILE.yaml", help="default: the earlier run's own")
    _add_fields(plan, "width_multiple")
    add("--json", action="store_true", help="print only the plans, with the indices of heavy hitters")
    table = command("latency-table", "time a model at a dozen FFN widths here (experimental)")
    add = table.add_argument
    add("model", help="a local directory or a hub id")
    add("--out", required=True, metavar="FILE.json")
    add("--batch-size", type=int, default=8, metavar="N", help="rows per forward pass; default: 8")
    add("--num-tokens", type=int, default=128, metavar="N", help="tokens per row; default: 128")
    add("--threads", type=int, default=1, metavar="N", help="default: 1, as in runs")
    _add_fields(table, "device", "dtype", "revision", *LOADING)


def _add_result_commands(command: Command) -> None:
    verify = command("verify", "recompute every digest of an artifact")
    verify.add_argument("uri")
    report = command("report", "write the HTML report of an artifact")
    report.add_argument("uri")
    report.add_argument("--out", required=True, metavar="FILE")
    benchmark = command("benchmark", "time an artifact and its original alternately")
    add = benchmark.add_argument
    add("uri", metavar="URI_OR_MODEL")
    add(
        "--against",
        metavar="MODEL",
        help="default: the model the artifact was made from, if it is a hub id or s3://",
    )
    add("--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[16, 128],
        metavar="N",
        help="tokens per row; default: 16 128",
    )
    add("--pairs", type=int, default=30, metavar="N", help="passes of each model per shape; default: 30")
    add("--new-tokens", type=int, default=32, metavar="N", help="tokens a causal model decodes; default: 32")
    add("--threads", type=int, metavar="N", help="default: torch's choice, at most one per usable core")
    add("--no-memory", action="store_true", help="skip measuring peak memory (it loads each model again)")
    add("--no-publish", action="store_true", help="do not append the record to a published artifact")
    add("--json", action="store_true", help="print only the record on stdout")
    _add_fields(benchmark, "device", "dtype", *LOADING)
    export = command("export", "write an artifact in another format")
    add = export.add_argument
    add("uri", help="an artifact, or a model's directory")
    add("--format", required=True, choices=("onnx",))
    add("--out", required=True, metavar="DIR", help="a new or empty directory")
    add("--optimize", action="store_true", help="onnx: fuse operators by onnxruntime's own optimizer")
    add("--quantize", choices=("int8",), help="onnx: also write a graph with dynamic int8, by onnxruntime")
    _add_fields(export, *LOADING)


def _add_store_commands(command: Command) -> None:
    pull = command("pull", "download an artifact and verify every byte")
    add = pull.add_argument
    add("uri", help="where runs were published, a run, an attempt, or a link of `share`")
    add("directory", nargs="?", metavar="DIR", help="default: the cache; its directory is printed")
    add(
        "--verify-key", metavar="KEY", help="refuse an artifact that is not signed by this public key's owner"
    )
    share = command("share", "make a link that pulls an artifact without credentials")
    share.add_argument("uri", help="where runs were published, a run or an attempt, in s3://")
    share.add_argument("--expires", default="1h", metavar="T", help="90s, 30m, 12h or 7d; default: 1h")
    listing = command("list", "list the committed runs of a store")
    listing.add_argument("uri", help="where runs were published")
    listing.add_argument("--json", action="store_true", help="one JSON array on stdout")
    pin = command("pin", "protect a run from gc")
    pin.add_argument("uri", help="a run, or where runs were published: then the newest model")
    pin.add_argument("--remove", action="store_true", help="unpin it")
    gc = command("gc", "delete old runs and leftovers; dry run unless --delete")
    add = gc.add_argument
    add("uri", help="where runs were published")
    add("--keep-last", type=int, required=True, metavar="N", help="keep the newest N models and N statistics")
    add("--min-age", default="1d", metavar="T", help="keep younger uncommitted attempts; default: 1d")
    add("--delete", action="store_true", help="delete; the default is a dry run")


def _add_batch_commands(command: Command) -> None:
    zoo = command("zoo", "compress every model of a zoo file, and publish what passes its gates")
    add = zoo.add_argument
    add("file", metavar="ZOO.yaml", help="models, recipes, budgets, gates and the destination")
    add("--workers", type=int, metavar="N", help="per model; default: an equal share of the cluster")
    _add_fields(zoo, "address", "runner")
    add("--json", action="store_true", help="print only the batch's manifest on stdout")
    submit = command("submit", "run a command as a job on a cluster, follow it, return its exit code")
    add = submit.add_argument
    add(
        "--address",
        metavar="URL",
        help=f"the job server's address; default: RAY_API_SERVER_ADDRESS, or {DEFAULT_ADDRESS}",
    )
    add("--working-dir", metavar="DIR", help="upload this directory; relative paths are inside it")
    add("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job; default: it keeps running")
    add("command", choices=SUBMITTED)
    add("arguments", nargs=argparse.REMAINDER, help="its arguments; an output must be an absolute path")
