"""Compress a model larger than a worker, killed half way and resumed, into benchmarks/large_models.md.

    python benchmarks/large_models.py FOLDER          about 40 GB free there; half an hour on two idle cores

Writes a checkpoint of Llama-7B's shape with random bf16 weights, shard by shard; takes 48 sequences of 128
tokens through calibration, pruning with bias compensation, assembly and fidelity, block by block; kills the
driver with SIGKILL when half of the calibration is done, and runs the same again. The memory of every
process is read from /proc twice a second: anonymous pages are what has to be in memory, file-backed ones
are what the kernel keeps there as long as there is room. Fails where a process went over --limit.
What it wrote in FOLDER is removed at the end, unless --keep-files is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

HERE = Path(__file__).parent
RECIPE = """\
name: large
description: The neurons whose output varies most, the rest replaced by its mean as a bias.
score: centred
heavy_share: 1
steps: [{kind: prune, compensation: bias}]
calibration: {shard_size: 8, batch_tokens: 1024, sampled_tokens: 256, held_out: 4}
measurement: {peak_memory: false}
"""
MAX_LENGTH, KEEP, VOCABULARY, MEMORY = 128, 0.5, 32000, "6GB"
POOL_SIZE = 10_000_019
"""Random numbers that all weights are cut from; drawing 6.7 billion would take longer than the rest."""
SAMPLE_EVERY_S = 0.5
GB = 1e9


class Peak(NamedTuple):
    """The most that one process of a role held during one stage, in bytes."""

    anonymous: int = 0
    file_backed: int = 0


class Run(NamedTuple):
    """One start of the driver: seconds and peaks by stage, in order, and how it ended."""

    seconds: dict[str, float]
    peaks: dict[tuple[str, str], Peak]
    reused: dict[str, str]
    killed: bool


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial")
    parser.add_argument("--rows", type=int, default=48, help="sequences; fewer for a trial")
    parser.add_argument("--limit", type=float, default=6.0, help="GB of anonymous memory a process may hold")
    parser.add_argument("--out", type=Path, default=HERE / "large_models.md")
    parser.add_argument("--keep-files", action="store_true")
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    folder: Path = parsed.folder.resolve()
    if parsed.drive:
        return drive(folder, num_rows=parsed.rows)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        started = time.monotonic()
        write_checkpoint(folder / "model", num_layers=parsed.layers)
        written_s = time.monotonic() - started
        (folder / "recipe.yaml").write_text(RECIPE)
        runs = [observe(folder, num_rows=parsed.rows, kill_half_way=kill) for kill in (True, False)]
        page, largest = describe(folder, runs, written_s=written_s, parsed=parsed)
        parsed.out.write_text(page)
        print(page)
        return 0 if largest < parsed.limit * GB else 1
    finally:
        if not parsed.keep_files:
            for name in ("model", "out", "tmp"):
                shutil.rmtree(folder / name, ignore_errors=True)


def write_checkpoint(directory: Path, *, num_layers: int) -> None:
    """Llama-7B's shape with random weights, a file a layer, one layer in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if (directory / "model.safetensors.index.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        num_hidden_layers=num_layers, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(directory)
    write_tokenizer(directory)
    width, inner = config.hidden_size, config.intermediate_size
    attention = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    ffn = {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
    norms = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    block = attention | ffn | {"mlp.down_proj.weight": (width, inner)} | norms
    parts = [
        {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        for layer in range(num_layers)
    ]
    table = (VOCABULARY, width)
    parts.append({"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (width,)})
    generator, weight_map = torch.Generator().manual_seed(0), {}
    pool = torch.empty(POOL_SIZE, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, shape in part.items():
            start = int(torch.randint(POOL_SIZE, (), generator=generator))
            values = pool.roll(start).repeat(-(-math.prod(shape) // POOL_SIZE))[: math.prod(shape)]
            tensors[name] = torch.ones(shape, dtype=pool.dtype) if len(shape) == 1 else values.view(shape)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of the text that calibration reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ffsplit.calibration.sources import read_all

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(read_all(("builtin:pydoc",)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)


def drive(folder: Path, *, num_rows: int) -> int:
    """The driver, a process of its own: one run, which tells its stages on stdout."""
    import ffsplit
    from ffsplit.artifacts.units import parse_size
    from ffsplit.progress import Progress

    class Told(Progress):
        def start(self, stage: str, total: int) -> None:
            super().start(stage, total)
            print(f"start {stage} {total}", flush=True)

        def advance(self) -> None:
            super().advance()
            print(f"done {self._stage} {self._done} {self._total}", flush=True)

    config = ffsplit.JobConfig(
        model=str(folder / "model"),
        out=str(folder / "out"),
        recipe=str(folder / "recipe.yaml"),
        keep=KEEP,
        samples=num_rows,
        max_length=MAX_LENGTH,
        dtype="bfloat16",
        memory_per_worker=parse_size(MEMORY, name="memory"),
    )
    ffsplit.compress(config, progress=Told.to_stderr())
    return 0


def observe(folder: Path, *, num_rows: int, kill_half_way: bool) -> Run:
    """Run the driver and watch it and everything it started."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, __file__, str(folder), "--rows", str(num_rows), "--drive"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert driver.stdout is not None
    os.set_blocking(driver.stdout.fileno(), False)
    stage, since, seconds = "prepare", time.monotonic(), defaultdict(float)
    peaks: dict[tuple[str, str], Peak] = defaultdict(Peak)
    family: dict[int, psutil.Process] = {}
    killed = False
    while driver.poll() is None:
        for process, role in relatives(driver.pid):
            family[process.pid] = process
            anonymous, file_backed = resident(process.pid)
            peak = peaks[stage, role]
            peaks[stage, role] = Peak(max(peak.anonymous, anonymous), max(peak.file_backed, file_backed))
        for line in driver.stdout.readlines():
            event, name, *numbers = line.split()
            following = name if event == "start" else f"after {name}" if numbers[0] == numbers[1] else stage
            now = time.monotonic()
            seconds[stage] += now - since
            stage, since = following, now
            if (
                kill_half_way
                and name == "calibrate"
                and event == "done"
                and 2 * int(numbers[0]) >= int(numbers[1])
            ):
                driver.send_signal(signal.SIGKILL)
                killed = True
        time.sleep(SAMPLE_EVERY_S)
    seconds[stage] += time.monotonic() - since
    if not killed and driver.returncode != 0:
        raise SystemExit(f"the run failed with exit code {driver.returncode}")
    _, alive = psutil.wait_procs(list(family.values()), timeout=30)
    for process in alive:
        process.kill()
    return Run(dict(seconds), dict(peaks), reused_of(folder), killed)


def relatives(pid: int) -> Iterator[tuple[psutil.Process, str]]:
    """The driver and its descendants, each with its role."""
    try:
        driver = psutil.Process(pid)
        yield driver, "driver"
        for process in driver.children(recursive=True):
            name = " ".join(process.cmdline()[:2])
            yield process, "worker" if name.startswith("ray::") else "Ray's own"
    except psutil.NoSuchProcess:
        return


def resident(pid: int) -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return tuple(int(found.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def reused_of(folder: Path) -> dict[str, str]:
    manifests = list((folder / "out").glob("*/*/manifest.json"))
    if not manifests:
        return {}
    stages = json.loads(manifests[0].read_text())["stages"]
    return {each["name"]: f"{each['num_reused']} of {each['num_items']}" for each in stages}


NAMES = {
    "after calibrate": "reduce, plan",
    "after compress": "assemble",
    "after measure": "documents, publish",
}


def describe(
    folder: Path, runs: Sequence[Run], *, written_s: float, parsed: argparse.Namespace
) -> tuple[str, int]:
    """The page, and the largest anonymous memory of any process."""
    import ffsplit
    from ffsplit.artifacts.verify import verify
    from ffsplit.environment import describe_environment

    (path,) = (folder / "out").glob("*/*/manifest.json")
    manifest = ffsplit.Manifest.from_json(path.read_text())
    measured: Any = manifest.measurements
    hardware = describe_environment().hardware
    largest = max(peak.anonymous for run in runs for peak in run.peaks.values())
    report = verify(str(folder / "out"))
    lines = [
        "# Models larger than a worker",
        "",
        f"`python benchmarks/large_models.py FOLDER`: Llama-7B's shape with {parsed.layers} of 32 layers, "
        f"random bf16 weights, {measured.original_size.file_bytes / GB:.1f} GB; {parsed.rows} sequences of "
        f"{MAX_LENGTH} tokens, bf16, {MEMORY} a worker, so one block at a time; keep {KEEP}, neurons pruned "
        f"with bias compensation. {hardware['processor']}, {hardware['num_cpus']} cores, "
        f"{int(hardware['memory_bytes']) / GB:.0f} GB.",
        "",
        f"**The largest anonymous memory of any process was {largest / GB:.2f} GB.** "
        f"The checkpoint took {written_s:.0f} s to write.",
        "",
        "Peaks in GB, of one process. Anonymous pages have to be in memory; file-backed ones (weights and "
        "hidden states, mapped) are kept there while there is room.",
    ]
    for run in runs:
        title = "Killed with SIGKILL half way through calibration" if run.killed else "Resumed, to the end"
        lines += ["", f"## {title}", ""]
        lines += [
            "| stage | seconds | reused | driver, anonymous | worker, anonymous | worker, file-backed |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        for stage, seconds in run.seconds.items():
            driver, worker = (run.peaks.get((stage, role), Peak()) for role in ("driver", "worker"))
            numbers = [driver.anonymous, worker.anonymous, worker.file_backed]
            cells = [f"{value / GB:.2f}" if value else "" for value in numbers]
            reused = "" if run.killed else run.reused.get(stage, "")
            lines += [f"| {NAMES.get(stage, stage)} | {seconds:.0f} | {reused} | {' | '.join(cells)} |"]
    first, last = measured.blocks[0], measured.blocks[-1]
    scores = ", ".join(f"{name} {value:.4g}" for name, value in measured.fidelity.items())
    lines += [
        "",
        "## The result",
        "",
        f"{measured.compressed_size.file_bytes / GB:.1f} GB in files of at most 5 GB; `ffsplit verify`: "
        f"{'whole' if report.ok else 'NOT whole'}. Random weights lose much when half of them go; "
        "the figures only show that the comparison runs.",
        "",
        f"Hidden states after block {first.layer}: relative error {first.relative_error:.3f}, cosine "
        f"{first.cosine:.4f}; after block {last.layer}: {last.relative_error:.3f}, {last.cosine:.4f}.",
        "",
        f"On held-out text: {scores}.",
        "",
        *(f"Not measured: {each}." for each in measured.skipped),
    ]
    return "\n".join([*lines, ""]), largest


if __name__ == "__main__":
    raise SystemExit(main())
