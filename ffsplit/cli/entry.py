"""The command line: every command and its flags. What they do is in `commands.py`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from ffsplit import __version__, logs
from ffsplit.cli.overview import FLAG_GROUPS, overview, with_examples
from ffsplit.config import Flag, JobConfig, flag_of
from ffsplit.errors import ConfigError, did_you_mean
from ffsplit.exit_codes import (
    DESCRIPTION,
    DONE,
    MISTAKE,
    checked_output,
    exit_code_of,
    quiet_libraries,
    show_tracebacks,
)
from ffsplit.models.load_options import attending, trusting
from ffsplit.recipes import shipped_recipes
from ffsplit.store.entries import check_absolute

PRINTING = ("benchmark", "completion", "inspect", "list", "plan", "recipes", "share", "verify")
"""Commands whose only result is what they print."""
SUBMITTED = ("compress", "calibrate", "zoo", "benchmark", "pull")
"""Commands that can run as a job on a cluster."""
LOADING = ("attn_implementation", "trust_remote_code")
"""Fields of JobConfig for loading models. Every command that loads one has them."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"

Command = Callable[[str, str], argparse.ArgumentParser]
"""Adds a command, from its name and description."""


_WRONG_NAME = re.compile(r"unrecognized arguments: (?P<flag>-[^\s=]+)|: invalid choice: '(?P<choice>[^']*)'")


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line, with the closest flag or choice. Flags cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        known = {name for parser in (self, *self._commands()) for name in parser._option_string_actions}
        flags = [given.partition("=")[0] for given in self._given if given.startswith("--") and given != "--"]
        wrong_flags = [flag for flag in flags if flag not in known]
        wrong = _WRONG_NAME.search(message)
        if wrong is None and wrong_flags:  # the reason why a required argument is missing
            message = f"unrecognized arguments: {wrong_flags[0]}"
            wrong = _WRONG_NAME.search(message)
        if wrong is None:
            raise ConfigError(message)
        if wrong["flag"]:
            raise ConfigError(message + did_you_mean(wrong["flag"], sorted(known)))
        choices = [name for action in self._actions for name in action.choices or ()]
        near = did_you_mean(wrong["choice"], choices)
        if self._commands():
            raise ConfigError(f"unknown command {wrong['choice']!r}{near or ': ffsplit alone lists them'}")
        raise ConfigError(message + near)

    def _commands(self) -> list[argparse.ArgumentParser]:
        return [
            each
            for action in self._actions
            if isinstance(action.choices, dict)
            for each in action.choices.values()
        ]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps between words alone: a flag or a command's name stays whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Root(_Parser):
    """Its help is the overview of all commands."""

    def format_help(self) -> str:
        return overview(
            {each.get_default("title"): each.description or "" for each in self._commands()},
            ending=DESCRIPTION,
        )


def main(arguments: Sequence[str] | None = None, *, in_job: bool = False) -> int:
    """Run one command and return its exit code.

    `in_job` refuses a relative output, which would be lost with the job's working directory.
    """

    def run() -> int:
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
            import argcomplete

            argcomplete.autocomplete(parser)
        if not (sys.argv[1:] if arguments is None else arguments):
            parser.print_help()
            return MISTAKE
        try:
            parsed = parser.parse_args(arguments)
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
        with (
            quiet_libraries(),
            trusting(bool(getattr(parsed, "trust_remote_code", False))),
            attending(attention),
        ):
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
    parser = _Root(prog="ffsplit")
    parser.add_argument("--version", action="version", version=f"ffsplit {__version__}")
    _add_debug_flag(parser)
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=with_examples(name, DESCRIPTION),
            formatter_class=_Help,
        )
        added.set_defaults(title=name)
        _add_debug_flag(added)
        return added

    _add_job_commands(command)
    _add_planning_commands(command)
    _add_result_commands(command)
    _add_store_commands(command)
    _add_batch_commands(command)
    _add_shell_commands(command)
    return parser


def _add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """The flag works before the command's name and after it."""
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the traceback of an error, and warnings of other libraries",
    )


def _add_fields(parser: argparse.ArgumentParser, *names: str) -> dict[str, argparse._ArgumentGroup]:
    """Options for fields of JobConfig, from their types and Flags. Returns their groups by title."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    title_of = {name: title for title, fields in FLAG_GROUPS.items() for name in fields}
    for name in sorted(names, key=[*title_of].index):
        title = title_of[name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        field = JobConfig.model_fields[name]
        flag = next(each for each in field.metadata if isinstance(each, Flag))
        about = field.description or ""
        if name == "recipe":
            about += f"; shipped are {', '.join(shipped_recipes())}"
        options: dict[str, Any] = {"help": about.replace("%", "%%"), "default": None}
        kind = _kind_of(field.annotation)
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["metavar"] = flag.metavar
            if get_origin(kind) is tuple:
                options["action"] = "append"
        groups[title].add_argument(flag_of(name), required=field.is_required(), **options)
    return groups


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
        parser.usage = f"{parser.prog} MODEL --out URI [flags]"
        parser.add_argument("model", metavar="MODEL", help=JobConfig.model_fields["model"].description)
        shown = [name for name, flag in flags.items() if parser is compress or not flag.compress_only]
        add = _add_fields(parser, *shown)["output"].add_argument
        add("--dry-run", action="store_true", help="print what the run would need, and stop")
        add("--sign-key", metavar="KEY", help="sign the manifest with this EC private key (PEM)")
        add("--json", action="store_true", help="print only the manifest on stdout")
        add("--log-format", choices=("text", "json"), help="format of stderr; default: FFSPLIT_LOG, or text")


def _add_planning_commands(command: Command) -> None:
    inspect = command("inspect", "show a model's FFNs and what each budget would give")
    inspect.add_argument("model", help=JobConfig.model_fields["model"].description)
    _add_fields(inspect, "recipe", "width_multiple", *LOADING)
    plan = command("plan", "forecast budgets from an earlier run's statistics")
    add = plan.add_argument
    add("uri", help="an artifact, or a run of ffsplit calibrate")
    add("--keep", nargs="+", default=[], metavar="F", help="such as 0.35 or 35%%")
    add("--max-bytes", nargs="+", default=[], metavar="SIZE", help="maximum for all FFNs, such as 5MB")
    add("--max-parameters", nargs="+", default=[], metavar="N", help="maximum for the whole model")
    add(
        "--max-latency-ms",
        nargs="+",
        default=[],
        metavar="F",
        help="maximum for a forward pass (experimental)",
    )
    add("--latency-table", metavar="FILE", help="for --max-latency-ms: what ffsplit latency-table wrote")
    add("--recipe", metavar="NAME|FILE.yaml", help="default: the earlier run's own")
    _add_fields(plan, "width_multiple")
    add("--json", action="store_true", help="print only the plans, with the indices of heavy hitters")
    recipes = command("recipes", "list the shipped recipes, or print one as YAML")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this recipe")
    table = command("latency-table", "time a model at a dozen FFN widths here (experimental)")
    add = table.add_argument
    add("model", help="a local directory or a hub id")
    add("--out", required=True, metavar="FILE.json", help="the table to write")
    add("--batch-size", type=int, default=8, metavar="N", help="rows per forward pass; default: 8")
    add("--num-tokens", type=int, default=128, metavar="N", help="tokens per row; default: 128")
    add("--threads", type=int, default=1, metavar="N", help="default: 1, as in runs")
    _add_fields(table, "device", "dtype", "revision", *LOADING)


def _add_result_commands(command: Command) -> None:
    verify = command("verify", "recompute every digest of an artifact")
    verify.add_argument(
        "uri", help="where runs were published, URI@ALIAS, a run, an attempt or a copy of one"
    )
    report = command("report", "write the HTML report of an artifact")
    report.add_argument("uri", help="where runs were published, URI@ALIAS, a run or an attempt")
    report.add_argument("--out", required=True, metavar="FILE", help="the page to write")
    benchmark = command("benchmark", "time an artifact and its original alternately")
    add = benchmark.add_argument
    add("uri", metavar="URI_OR_MODEL", help="an artifact, or a model's directory")
    add(
        "--against",
        metavar="MODEL",
        help="default: the model the artifact was made from, if it is a hub id or s3://",
    )
    add("--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="rows; default: 1 8")
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
    add("--format", required=True, choices=("onnx", "compressed-tensors"), help="what to write")
    add(
        "--scheme",
        choices=("W8A8", "W8A16", "W4A16"),
        help="compressed-tensors: bits of weights and inputs; default: as stored. Rounds a plain result",
    )
    add("--out", required=True, metavar="DIR", help="a new or empty directory")
    add("--optimize", action="store_true", help="onnx: fuse operators by onnxruntime's own optimizer")
    add("--quantize", choices=("int8",), help="onnx: also write a graph with dynamic int8, by onnxruntime")
    _add_fields(export, *LOADING)


def _add_store_commands(command: Command) -> None:
    pull = command("pull", "download an artifact and verify every byte")
    add = pull.add_argument
    add("uri", help="where runs were published, URI@ALIAS, a run, an attempt, or a link of `share`")
    add("directory", nargs="?", metavar="DIR", help="default: the cache; its directory is printed")
    add(
        "--verify-key", metavar="KEY", help="refuse an artifact that is not signed by this public key's owner"
    )
    push = command("push", "upload an artifact to the Hugging Face hub, in one commit")
    add = push.add_argument
    add("uri", help="where runs were published, a run or an attempt")
    add("repo", metavar="ORG/NAME", help="a new repository on the hub, or an empty one")
    add("--public", action="store_true", help="let everybody see it; default: private")
    share = command("share", "make a link that pulls an artifact without credentials")
    share.add_argument("uri", help="where runs were published, a run or an attempt, in s3://")
    share.add_argument("--expires", default="1h", metavar="T", help="90s, 30m, 12h or 7d; default: 1h")
    listing = command("list", "list the committed runs of a store")
    listing.add_argument("uri", help="where runs were published; URI@ALIAS lists the history of an alias")
    listing.add_argument("--json", action="store_true", help="one JSON array on stdout")
    promote = command("promote", "let an alias, such as production, name a run")
    promote.add_argument("uri", help="a run, URI@ALIAS, or where runs were published: then the newest model")
    promote.add_argument("--as", dest="alias", required=True, metavar="ALIAS", help="such as production")
    promote.add_argument("--remove", action="store_true", help="remove the alias; its history stays")
    pin = command("pin", "protect a run from gc")
    pin.add_argument("uri", help="a run, or where runs were published: then the newest model")
    pin.add_argument("--remove", action="store_true", help="unpin it")
    gc = command("gc", "delete old runs and leftovers; dry run unless --delete")
    add = gc.add_argument
    add("uri", help="where runs were published")
    add("--keep-last", type=int, required=True, metavar="N", help="keep the newest N models and N statistics")
    add("--min-age", default="1d", metavar="T", help="keep younger uncommitted attempts; default: 1d")
    add("--delete", action="store_true", help="delete; the default is a dry run")


def _add_shell_commands(command: Command) -> None:
    completion = command("completion", "print a script that completes commands and flags in a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _add_batch_commands(command: Command) -> None:
    zoo = command("zoo", "compress the models of a zoo file, publish what passes gates")
    add = zoo.add_argument
    add("file", metavar="ZOO.yaml", help="models, recipes, budgets, gates and the destination")
    add("--workers", type=int, metavar="N", help="per model; default: an equal share of the cluster")
    _add_fields(zoo, "address", "runner")
    add("--dry-run", action="store_true", help="print what would run, why and at what cost, and stop")
    add("--json", action="store_true", help="print only the batch's manifest, or the forecast, on stdout")
    submit = command("submit", "run a command as a job on a cluster and return its exit code")
    add = submit.add_argument
    add(
        "--address",
        metavar="URL",
        help=f"the job server's address; default: RAY_API_SERVER_ADDRESS, or {DEFAULT_ADDRESS}",
    )
    add("--working-dir", metavar="DIR", help="upload this directory; relative paths are inside it")
    add("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job; default: it keeps running")
    add("command", choices=SUBMITTED, metavar="COMMAND", help=f"one of {', '.join(SUBMITTED)}")
    add(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments; outputs are absolute paths"
    )
