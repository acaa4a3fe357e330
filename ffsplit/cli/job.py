"""The flags of a job, which every command that runs one shares."""

from __future__ import annotations

import argparse
from functools import partial

from ffsplit.config import parse_size
from ffsplit.models.load_options import ATTENTIONS


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a local directory, s3://bucket/prefix, a place of runs or a hub id")
    add("--out", required=True, metavar="URI", help="a directory or s3://bucket/prefix")
    add("--recipe", default="fast", metavar="NAME|FILE.yaml", help="default: fast")
    add("--keep", type=float, metavar="F", help="fraction of the FFN elements to keep, in (0, 1]")
    add(
        "--calibration",
        action="append",
        metavar="SPEC",
        help="file.txt, file.jsonl#field, file.csv#column, file.tsv#column, file.parquet#column, "
        "hf:dataset[:config]#column@split or builtin:pydoc (the default); may be repeated. Images and audio "
        "(docs/models.md) are experimental",
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
    add_loading_flags(parser)
    add("--dry-run", action="store_true", help="say what the run would need, and stop")
    add("--fresh", action="store_true", help="run again even when this run is committed already")
    add("--sign-key", metavar="KEY", help="sign the manifest with this EC private key (PEM)")
    add("--json", action="store_true", help="print the manifest alone on stdout")
    add("--log-format", choices=("text", "json"), help="of stderr; default: FFSPLIT_LOG, or text")


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded, in every command that loads one."""
    parser.add_argument(
        "--attn-implementation",
        choices=ATTENTIONS,
        help="attention to run the model with; default: what its config names",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model; read it first"
    )


def add_judging_flags(parser: argparse.ArgumentParser) -> None:
    """How a result is scored, and what it must reach to be published."""
    parser.add_argument(
        "--plain",
        action="store_true",
        help="refuse a recipe whose result would need ffsplit to load",
    )
    parser.add_argument(
        "--eval",
        action="append",
        metavar="SPEC",
        help="score both models: sts:file.csv[#first,second,score], classification:file.tsv[#text,label], "
        "perplexity:file.txt or lm-eval:task[,task] (experimental); may be repeated",
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
