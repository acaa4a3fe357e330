"""What `ffsplit` and `--help` show: commands in groups, flags in groups, and examples of every command."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import yaml

COMMAND_GROUPS = {
    "Compress": ("compress", "calibrate", "zoo", "submit"),
    "Look ahead": ("inspect", "plan", "recipes", "latency-table"),
    "Use a result": ("list", "pull", "verify", "report", "benchmark", "export", "push", "share"),
    "Keep a store in order": ("promote", "pin", "gc"),
    "Shell": ("completion",),
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "compress": (
        "ffsplit compress path/to/model --out out/small --keep 0.5",
        "ffsplit compress org/name --out s3://models/name --recipe best",
    ),
    "calibrate": (
        "ffsplit calibrate path/to/model --out out/statistics",
        "ffsplit calibrate path/to/model --out out --calibration mine.jsonl#text",
    ),
    "zoo": ("ffsplit zoo zoo.yaml", "ffsplit zoo zoo.yaml --dry-run"),
    "submit": (
        "ffsplit submit compress org/name --out s3://models/name",
        "ffsplit submit --working-dir . zoo zoo.yaml",
    ),
    "inspect": ("ffsplit inspect path/to/model", "ffsplit inspect org/name --recipe split"),
    "plan": (
        "ffsplit plan out/statistics --keep 35% 50%",
        "ffsplit plan out/statistics --max-bytes 40MB --recipe int8",
    ),
    "recipes": ("ffsplit recipes", "ffsplit recipes fast > mine.yaml"),
    "latency-table": (
        "ffsplit latency-table path/to/model --out table.json",
        "ffsplit latency-table path/to/model --out table.json --batch-size 1",
    ),
    "list": ("ffsplit list out/small", "ffsplit list s3://models/name --json"),
    "pull": (
        "ffsplit pull s3://models/name small",
        "ffsplit pull s3://models/name small --verify-key public.pem",
    ),
    "verify": ("ffsplit verify out/small", "ffsplit verify s3://models/name"),
    "report": (
        "ffsplit report out/small --out report.html",
        "ffsplit report s3://models/name --out report.html",
    ),
    "benchmark": (
        "ffsplit benchmark out/small --against path/to/model",
        "ffsplit benchmark s3://models/name --batch-sizes 1 32 --device cuda",
    ),
    "export": (
        "ffsplit export out/small --format onnx --out onnx",
        "ffsplit export out/int8 --format compressed-tensors --out vllm",
    ),
    "push": ("ffsplit push out/small org/small", "ffsplit push s3://models/name org/small --public"),
    "share": ("ffsplit share s3://models/name", "ffsplit share s3://models/name --expires 7d"),
    "promote": (
        "ffsplit promote out/0123456789abcdef --as production",
        "ffsplit promote s3://models/name --as production --remove",
    ),
    "pin": ("ffsplit pin s3://models/name", "ffsplit pin s3://models/name --remove"),
    "gc": ("ffsplit gc s3://models/name --keep-last 3", "ffsplit gc out/small --keep-last 1 --delete"),
    "completion": ('eval "$(ffsplit completion bash)"', "ffsplit completion fish | source"),
}
"""Of every command; the first is shown in the overview."""

FLAG_GROUPS = {
    "model and data": (
        "revision",
        "trust_remote_code",
        "attn_implementation",
        "calibration",
        "samples",
        "max_length",
        "stats",
        "seed",
        "only",
        "skip",
    ),
    "budget": ("keep", "max_bytes", "max_parameters", "max_latency_ms", "latency_table", "width_multiple"),
    "recipe": ("recipe", "plain"),
    "where it runs": (
        "runner",
        "address",
        "workers",
        "gpus_per_worker",
        "accelerator_type",
        "threads_per_worker",
        "memory_per_worker",
        "healing_workers",
        "healing_threads",
        "device",
        "dtype",
        "block_by_block",
    ),
    "output": ("out", "eval", "gate", "require_speedup", "mlflow", "fresh"),
}
"""The flags of a run by the names of JobConfig's fields."""


def overview(about: Mapping[str, str], *, ending: str) -> str:
    """The commands in their groups, each with what it does and an example."""
    lines = ["usage: ffsplit COMMAND ..., and ffsplit COMMAND --help for its flags", ""]
    for title, names in COMMAND_GROUPS.items():
        lines.append(title)
        for name in names:
            lines.append(f"  {name:<14} {about[name]}")
            lines.append(f"  {'':<14} $ {EXAMPLES[name][0]}")
        lines.append("")
    lines.append("--version prints the version, and --debug the traceback of an error.")
    return "\n".join([*lines, "", ending])


def with_examples(command: str, ending: str) -> str:
    """What a command's --help ends with."""
    shown = "".join(f"  {each}\n" for each in EXAMPLES[command])
    return f"examples:\n{shown}\n{ending}"


def listed_recipes(texts: Mapping[str, str], *, width: int) -> str:
    """Every recipe's name and description, in lines of at most `width` characters."""
    indent = " " * 16
    lines = []
    for name, text in texts.items():
        wrapped = textwrap.wrap(yaml.safe_load(text)["description"], max(24, width - len(indent)))
        lines += [f"{name:<14}  {wrapped[0]}", *(indent + line for line in wrapped[1:])]
    return "\n".join(lines)
