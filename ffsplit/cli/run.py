"""The commands about running a result: timing it, and writing it in other formats."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ffsplit.cli.job import add_loading_flags
from ffsplit.directories import user_path

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Run, str], argparse.ArgumentParser]


def add_run_commands(command: AddCommand) -> None:
    benchmark = command("benchmark", _benchmark, "time an artifact and its original, in turn")
    add_loading_flags(benchmark)
    add = benchmark.add_argument
    add("uri", metavar="URI_OR_MODEL")
    add(
        "--against",
        metavar="MODEL",
        help="default: the model the artifact was made from, if it is a hub id or s3://",
    )
    add("--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    add(
        "--lengths", type=int, nargs="+", default=[16, 128], metavar="N", help="tokens a row; default: 16 128"
    )
    add("--pairs", type=int, default=30, metavar="N", help="passes of each model at each shape; default: 30")
    add(
        "--new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens that causal models decode; default: 32",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--threads", type=int, metavar="N", help="default: as torch chooses, one per usable core at most")
    add("--no-memory", action="store_true", help="leave peak memory out, which loads each model once more")
    add("--no-publish", action="store_true", help="append nothing beside a published artifact")
    add("--json", action="store_true", help="print the record alone on stdout")
    export = command("export", _export, "write an artifact in another format")
    export.add_argument("uri", help="an artifact, or a model's directory")
    export.add_argument("--format", required=True, choices=("onnx",))
    export.add_argument(
        "--out", required=True, metavar="DIR", help="a directory that does not exist, or is empty"
    )
    add_loading_flags(export)


def _benchmark(parsed: argparse.Namespace) -> int:
    from ffsplit.cli.tables import print_benchmark
    from ffsplit.measurement.benchmark import Settings, benchmark, publish

    settings = Settings(
        batch_sizes=tuple(parsed.batch_sizes),
        lengths=tuple(parsed.lengths),
        pairs=parsed.pairs,
        new_tokens=parsed.new_tokens,
        device=parsed.device,
        dtype=parsed.dtype,
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
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from ffsplit.runtime.export import export

    print(export(parsed.uri, format=parsed.format, out=user_path(parsed.out)))
    return 0
