"""What a run needs is said before it begins, and what cannot fit is refused with what would mend it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ffsplit
from ffsplit import machine
from ffsplit.cli import main
from ffsplit.errors import ConfigError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.report.humanize import size
from ffsplit.run import estimate
from ffsplit.run import needs as records
from ffsplit.run.job import prepare
from ffsplit.run.needs import in_one_line
from tests.conftest import CheckpointFactory
from tests.shaped_checkpoints import LLAMA_70B, save_llama_shape
from tests.small_jobs import SmallJob, needs_of
from tests.tiny_families import save_checkpoint
from tests.tiny_models import save_checkpoint as save_bert

GB = 10**9


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama_shape(tmp_path_factory.mktemp("shape") / "llama-70b", **LLAMA_70B)


DRY_RUN = ["--recipe", "flap", "--dtype", "bfloat16", "--memory-per-worker", "40GB", "--dry-run"]


@pytest.mark.subprocess
@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_a_model_of_70_billion_is_told_of_by_few_libraries(
    llama_70b: Path, tmp_path: Path, command: str
) -> None:
    """From the command line: its headers are read, and nothing is imported that only a run needs."""
    more = ["--out", str(tmp_path / "out"), *DRY_RUN] if command == "compress" else []
    arguments = [command, str(llama_70b), *more]
    code = f"import sys; from ffsplit.cli.entry import main; main({arguments}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, modules = done.stdout.splitlines()
    assert ("calibrate, block by block" if command == "compress" else "70,5") in "\n".join(shown)
    loaded = set(modules.split())
    assert not {"ray", "torch._dynamo", "sympy", "transformers.models.llama"} & loaded
    assert ("transformers" in loaded) == (command == "compress")  # its tokenizer is looked at
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_goes_block_by_block(llama_70b: Path, small_job: SmallJob) -> None:
    def of(**fields: Any) -> records.Needs:
        config = small_job.config("out", model=str(llama_70b), recipe="flap", dtype="bfloat16", **fields)
        return needs_of(config)

    small, large = of(memory_per_worker=20 * GB), of(memory_per_worker=600 * GB)
    assert small.block_by_block and small.measured_block_by_block
    assert not large.block_by_block and not large.measured_block_by_block
    calibrate, whole = ({stage.name: stage for stage in each.stages}["calibrate"] for each in (small, large))
    assert 140 * GB < whole.memory_bytes < 160 * GB
    assert 5 * GB < calibrate.memory_bytes < 20 * GB
    assert small.model_bytes == pytest.approx(141 * GB, rel=0.01)
    assert small.artifact_bytes == pytest.approx(0.6 * 141 * GB, rel=0.05)
    assert of(block_by_block=True).block_by_block


def test_a_run_goes_as_the_pre_flight_says(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "PROCESS_BYTES", 0)
    needs = {stage.name: stage.memory_bytes for stage in needs_of(small_job.config(tmp_path)).stages}
    one_less = max(needs["calibrate"], needs["measure"]) - 1
    assert needs["compress"] <= one_less
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", memory_per_worker=one_less))
    assert "pre-flight: 1 worker" in capsys.readouterr().err
    assert manifest.measurements is not None
    assert bool(manifest.measurements.blocks) == (needs["measure"] > one_less)


@pytest.mark.parametrize(
    ("fields", "recipe", "expected"),
    [
        ({"memory_per_worker": 1 * GB}, {}, "calibrate needs about .* give a smaller batch_tokens"),
        ({"memory_per_worker": 1 * GB, "dtype": "float32"}, {}, "give --dtype bfloat16, or a smaller batch"),
        (
            {"memory_per_worker": 1 * 10**8},
            {},
            "digests needs about 0.6 GB per worker, and 0.1 GB are available",
        ),
        ({"memory_per_worker": 40 * GB}, {"more": "healing: {epochs: 1}"}, "heal needs .* without healing"),
        ({"memory_per_worker": 40 * GB}, {"allocation": "search"}, "which needs both .* uniform"),
        (
            {"memory_per_worker": 40 * GB, "eval": ("perplexity:{text}",)},
            {},
            "--eval needs both models whole",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    llama_70b: Path, small_job: SmallJob, tmp_path: Path, fields: Any, recipe: Any, expected: str
) -> None:
    if "eval" in fields:
        fields = fields | {"eval": tuple(spec.format(text=small_job.text) for spec in fields["eval"])}
    settings = {"dtype": "bfloat16", "model": str(llama_70b), "recipe": small_job.recipe(**recipe)} | fields
    with pytest.raises(ConfigError, match=expected) as caught:
        ffsplit.compress(small_job.config(tmp_path / "out", **settings))
    assert "--memory-per-worker" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fits_in_the_compressed_model_are_foreseen(small_job: SmallJob) -> None:
    """A pass of the text and a fit of every layer each time, and none where the result is not plain."""

    def of(more: str, step: str = "{kind: prune}, {kind: distill, num_steps: 9}", **how: Any) -> Any:
        recipe = small_job.recipe(step=step, more=more, **how)
        flight = needs_of(small_job.config("out", recipe=recipe, keep=0.5))
        return flight, {stage.name: stage for stage in flight.stages}

    (none, stages), (once, refitting) = of(""), of("refits: [{num_steps: 9}]")
    assert set(refitting) - set(stages) == {"refit"}
    assert refitting["refit"].memory_bytes > stages["compress"].memory_bytes
    twice = of("refits: [{num_steps: 9}, {num_steps: 9}]")[1]
    assert twice["refit"].seconds == pytest.approx(2 * refitting["refit"].seconds, rel=0.5)
    assert once.temporary.needed_bytes + once.store.needed_bytes > (
        none.temporary.needed_bytes + none.store.needed_bytes
    )
    assert "refit" not in of("refits: [{num_steps: 9}]", "{kind: low_rank}", heavy_share=0.5)[1]


def test_choosing_neurons_anew_one_after_the_other_is_foreseen(small_job: SmallJob) -> None:
    """A matrix of all neurons by all neurons is inverted, of which there are three, in float64."""

    def of(order: str, compensation: str) -> Any:
        step = f"{{kind: prune, order: {order}, compensation: {compensation}}}"
        flight = needs_of(small_job.config("out", model=str(model), recipe=small_job.recipe(step=step)))
        return next(stage for stage in flight.stages if stage.name == "compress")

    model = save_bert(small_job.folder / "wide", "bert", intermediate_size=768)
    anew, once = of("optimal_brain", "least_squares"), of("score", "none")
    assert anew.memory_bytes - once.memory_bytes == 3 * 768 * 768 * 8
    assert anew.seconds > 3 * once.seconds


def test_a_search_is_foreseen(small_job: SmallJob) -> None:
    """Layers are compressed a second time, and judged: time and room in the store."""

    def of(allocation: str) -> Any:
        recipe = small_job.recipe(allocation=allocation)
        flight = needs_of(small_job.config("out", recipe=recipe, keep=0.5))
        return flight, {stage.name: stage for stage in flight.stages}

    (uniform, stages), (search, searching) = of("uniform"), of("search")
    assert set(searching) - set(stages) == {"allocate"}
    assert searching["allocate"].seconds > searching["compress"].seconds
    assert search.store.needed_bytes > uniform.store.needed_bytes


def test_tables_of_widths_are_foreseen(small_job: SmallJob, checkpoint_of: Any) -> None:
    """All workers measure them. A GPU measures more tokens, and needs the room for their logits."""
    model = str(checkpoint_of("llama", head="ForCausalLM"))

    def of(allocation: str, device: str = "cpu") -> Any:
        recipe = small_job.recipe(allocation=allocation)
        run = prepare(small_job.config("out", model=model, recipe=recipe, keep=0.5))
        profile = run.profile.model_copy(update={"device": device})
        return replace(run, profile=profile).needs

    uniform, search = of("uniform"), of("search")
    stages = {stage.name: stage for stage in search.stages}
    assert set(stages) - {stage.name for stage in uniform.stages} == {"tables", "allocate"}
    assert stages["tables"].seconds > stages["allocate"].seconds > 0
    assert search.store.needed_bytes > uniform.store.needed_bytes
    on_gpu = next(stage for stage in of("search", "cuda").stages if stage.name == "tables")
    assert on_gpu.memory_bytes > stages["tables"].memory_bytes


def test_fewer_workers_where_that_is_enough(
    llama_70b: Path, small_job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "memory_limit_bytes", lambda: 50 * GB)
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    settings: dict[str, Any] = {
        "model": str(llama_70b),
        "recipe": "flap",
        "dtype": "bfloat16",
        "runner": "ray",
    }
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    crowded = needs_of(small_job.config("out", workers=8, **settings))
    assert any("give --workers" in problem for problem in crowded.problems)
    assert needs_of(small_job.config("out", workers=9, **settings)).machine == crowded.machine
    assert in_one_line(crowded, asked=9).startswith("pre-flight: 8 workers (9 requested, one per core), ")
    assert in_one_line(crowded, asked=8).startswith("pre-flight: 8 workers, ")
    elsewhere = needs_of(small_job.config("out", workers=8, address="10.0.0.1:6379", **settings))
    assert all(stage.available_bytes is None for stage in elsewhere.stages)


def test_by_default_there_are_no_more_workers_than_the_memory_holds(
    llama_70b: Path, small_job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with little memory on a host of many cores."""
    monkeypatch.setattr(records, "memory_limit_bytes", lambda: 6 * GB)
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    flight = needs_of(small_job.config("out", runner="ray"))
    assert not flight.problems and not flight.block_by_block
    workers, (calibrate,) = flight.machine.num_workers, [s for s in flight.stages if s.name == "calibrate"]
    assert 2 <= workers <= 9 and calibrate.num_workers == workers
    assert calibrate.available_bytes == int(6 * GB * records.SHARE_OF_MEMORY) // workers
    asked = needs_of(small_job.config("out", runner="ray", workers=64))
    assert "give --workers 8, or" in asked.problems[0]
    settings: dict[str, Any] = {"model": str(llama_70b), "recipe": "flap", "dtype": "bfloat16"}
    monkeypatch.setattr(records, "memory_limit_bytes", lambda: 200 * GB)
    large = needs_of(small_job.config("out", runner="ray", **settings))
    assert all(stage.fits for stage in large.stages)
    assert large.block_by_block and 2 <= large.machine.num_workers < 64


def test_too_little_disk_is_refused(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> str:
        with pytest.raises(ConfigError) as caught:
            ffsplit.compress(small_job.config(tmp_path / "out"))
        return str(caught.value)

    monkeypatch.setattr(estimate, "free_bytes", lambda path: 1000)
    assert "set TMPDIR" in refused()
    monkeypatch.setattr(estimate, "free_bytes", lambda path: 1000 if path.name == "out" else 10**12)
    assert f"--out {tmp_path / 'out'} needs" in refused().replace(" need ", " needs ")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_can_be_read_by_programs(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compress", *small_job.arguments(out, "--dry-run", "--json", "--runner", "serial")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in said["stages"]][1:3] == ["calibrate", "compress"]
    arguments = ["--out", str(out), "--calibration", str(small_job.text), "--dry-run", "--runner", "serial"]
    assert main(["calibrate", str(small_job.model), *arguments]) == 0
    assert "measure" not in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("more", ["", "refits: [{num_steps: 2}]"])
def test_a_dry_run_says_the_totals_that_the_run_says(
    more: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte but for the time, which each process estimates by its own speed."""
    arguments = small_job.arguments(
        tmp_path / "out", "--runner", "serial", "--recipe", small_job.recipe(more=more)
    )

    def line(text: str) -> str:
        (found,) = (each for each in text.splitlines() if each.startswith("pre-flight: "))
        return re.sub(r", about .*", "", found)

    assert main(["compress", *arguments, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert main(["compress", *arguments, "--dry-run", "--json"]) == 0
    flight = json.loads(capsys.readouterr().out)
    assert main(["compress", *arguments]) == 0
    assert line(dry) == line(capsys.readouterr().err)
    totals, stages = flight["totals"], flight["stages"]
    assert totals["disk_bytes"] == sum(
        flight[name]["needed_bytes"] for name in ("temporary", "store", "cache")
    )
    assert totals["memory_bytes"] == max(stage["num_workers"] * stage["memory_bytes"] for stage in stages)
    assert totals["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages))
    in_all = f"in total {size(totals['memory_bytes'])} of memory and {size(totals['disk_bytes'])} of disk"
    assert in_all.replace("\u00a0", " ") in line(dry)
    (row,) = (each for each in dry.splitlines() if "total" in each.split()[:2])
    assert size(totals["memory_bytes"]) in row


def test_places_on_one_disk_share_what_is_free(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would fit by itself."""
    flight = needs_of(small_job.config(tmp_path / "out"))
    larger = max(flight.temporary.needed_bytes, flight.store.needed_bytes)
    monkeypatch.setattr(estimate, "free_bytes", lambda path: larger)
    with pytest.raises(ConfigError, match=r"share a disk and need about .* together.*TMPDIR") as caught:
        ffsplit.compress(small_job.config(tmp_path / "out"))
    assert str(tmp_path / "out") in str(caught.value)
    devices = iter(range(100))
    monkeypatch.setattr(estimate, "device_of", lambda path: next(devices))
    assert not needs_of(small_job.config(tmp_path / "out")).problems


def test_a_cluster_hands_checkpoints_over_through_the_store(small_job: SmallJob) -> None:
    """What other hosts fetch lies in the store, and in each host's cache."""
    recipe = small_job.recipe(allocation="search")
    here = needs_of(small_job.config("out", recipe=recipe))
    cluster: dict[str, Any] = {"runner": "ray", "workers": 1, "address": "10.0.0.1:6379"}
    there = needs_of(small_job.config("out", recipe=recipe, **cluster))
    assert here.cache.needed_bytes == 0
    assert there.cache.needed_bytes > 3 * there.artifact_bytes + there.model_bytes
    assert there.store.needed_bytes - here.store.needed_bytes == there.cache.needed_bytes
    assert there.cache.free_bytes is None, "that of other hosts"
    said = f"{size(there.cache.needed_bytes)} of cached inputs".replace("\u00a0", " ")
    assert said in in_one_line(there) and "cached inputs" not in in_one_line(here)
    quantized = small_job.recipe(allocation="search", more="after_healing: {kind: quantize}")
    ending = needs_of(small_job.config("out", recipe=quantized, **cluster))
    assert ending.cache.needed_bytes > there.cache.needed_bytes


def test_peak_memory_takes_a_process_more(small_job: SmallJob, tmp_path: Path) -> None:
    recipe = small_job.folder / "peak.yaml"
    recipe.write_text(Path(small_job.recipe()).read_text().replace("peak_memory: false", "peak_memory: true"))
    needs = {each.name: each for each in needs_of(small_job.config("out", recipe=str(recipe))).stages}
    assert needs["peak memory"].memory_bytes > needs["measure"].memory_bytes
    one_less = needs["peak memory"].memory_bytes - 1
    with pytest.raises(ConfigError, match=r"peak memory needs about .*peak_memory: false"):
        ffsplit.compress(small_job.config(tmp_path / "out", recipe=str(recipe), memory_per_worker=one_less))


@pytest.mark.parametrize("after", ["", "after_healing: {kind: quantize}"])
def test_the_artifact_is_as_large_as_foreseen(
    after: str, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--runner", "serial", "--recipe", small_job.recipe(more=after))
    assert main(["compress", *small_job.arguments(tmp_path / "out", "--dry-run", "--json", *more)]) == 0
    foreseen = json.loads(capsys.readouterr().out)["artifact_bytes"]
    assert main(["compress", *small_job.arguments(tmp_path / "out", "--json", *more)]) == 0
    sizes = json.loads(capsys.readouterr().out)["measurements"]
    removed = sizes["original_size"]["ffn_bytes"] - sizes["compressed_size"]["ffn_bytes"]
    assert foreseen == open_checkpoint(small_job.model).num_bytes - removed


def test_a_size_that_is_none(checkpoint_of: CheckpointFactory, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint_of("bert")), "--out", "out", "--memory-per-worker", "lots"]
    assert main(["compress", *arguments]) == 2
    assert "--memory-per-worker must be a size such as 500MB or 50GB, not 'lots'" in capsys.readouterr().err


def test_statistics_of_many_shards_are_counted_at_every_level(small_job: SmallJob) -> None:
    """40 shards are reduced by two tasks first; one file of all layers each."""
    few, many = (
        needs_of(small_job.config("out", recipe=small_job.recipe(shard_size=size)), kind="statistics")
        for size in (40, 1)
    )
    assert many.store.needed_bytes - few.store.needed_bytes > 41 * 3 * 96 * 64
    assert many.artifact_bytes == 0
    assert many.temporary.needed_bytes < few.store.needed_bytes


def test_experts_keep_where_their_tokens_went(small_job: SmallJob, tmp_path: Path) -> None:
    """Their inputs are sampled once a block, with the experts of each token beside them."""
    model = str(save_checkpoint(tmp_path / "mixtral", "mixtral"))
    flight = needs_of(small_job.config("out", model=model))
    assert flight.store.needed_bytes > flight.artifact_bytes
    assert not flight.problems


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
HEALS = "healing: {epochs: 1}"


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama_shape(tmp_path_factory.mktemp("shape") / "llama-8b", **LLAMA_8B)


@pytest.fixture
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_bytes", lambda path: 10**15)


def on_gpus(
    small_job: SmallJob, model: Path, *, workers: int, gigabytes: int | None = None, **fields: Any
) -> records.Needs:
    config = small_job.config(
        "out",
        model=str(model),
        recipe=small_job.recipe(step="{kind: prune}", more=HEALS),
        runner="ray",
        device="cuda",
        healing_workers=workers,
        memory_per_worker=None if gigabytes is None else gigabytes * GB,
        **fields,
    )
    return needs_of(config)


def heal_of(needs: records.Needs) -> records.StageNeeds:
    return next(stage for stage in needs.stages if stage.name == "heal")


@pytest.mark.usefixtures("large_disk")
def test_healing_a_model_of_8_billion_is_planned_on_two_gpus(small_job: SmallJob, llama_8b: Path) -> None:
    """Each has its part of weights, gradients, moments and teacher; one alone would have all."""
    two, one = (on_gpus(small_job, llama_8b, workers=workers, gigabytes=80) for workers in (2, 1))
    assert two.problems == ()
    assert 50 * GB < heal_of(two).memory_bytes < 72 * GB
    assert heal_of(two).num_workers == 2 and two.totals.memory_bytes == 2 * heal_of(two).memory_bytes
    (problem,) = one.problems
    told = r"heal needs about (\d+) GB per GPU with 1 worker, and 80 GB are available: give --healing-workers"
    found = re.match(told + r" 2, on as many GPUs \(about (\d+) GB each\)", problem)
    assert (
        found
        and int(found[1]) > 110
        and int(found[2]) == pytest.approx(heal_of(two).memory_bytes / GB, abs=1)
    )
    for workers, fewest in ((2, 4), (4, None)):
        needs = on_gpus(small_job, llama_8b, workers=workers, gigabytes=45)
        assert (f"give --healing-workers {fewest}" in "".join(needs.problems)) == (fewest is not None), needs


@pytest.mark.usefixtures("large_disk")
def test_a_gpu_that_no_number_of_would_do_is_told(small_job: SmallJob, llama_70b: Path) -> None:
    """Block by block everything but healing fits into 24 GB."""
    problem = on_gpus(small_job, llama_70b, workers=8, gigabytes=18).problems[0]
    assert "nor would more such GPUs do" in problem and "\n" not in problem


@pytest.mark.usefixtures("large_disk")
def test_fewer_gpus_than_healing_workers_are_refused(
    small_job: SmallJob,
    llama_8b: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(records, "gpus_here", lambda: machine.GPUs(2, 85 * GB))
    assert on_gpus(small_job, llama_8b, workers=2).problems == ()
    assert heal_of(on_gpus(small_job, llama_8b, workers=2)).available_bytes == int(0.9 * 85 * GB)
    recipe = small_job.recipe(step="{kind: prune}", more=HEALS)
    options = ["--recipe", recipe, "--device", "cuda", "--healing-workers", "4", "--dry-run"]
    given = ["--calibration", str(small_job.text), "--keep", "0.5", "--max-length", "16"]
    assert main(["compress", str(llama_8b), "--out", "out", *options, *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--healing-workers 4 takes a GPU for each worker, and this machine has 2: give" in error


def test_half_precision_heals_on_one_gpu_alone(small_job: SmallJob) -> None:
    recipe = small_job.recipe(more="healing: {epochs: 1, mixed_precision: fp16}")
    options: dict[str, Any] = {"recipe": recipe, "runner": "ray", "device": "cuda"}
    needs_of(small_job.config("out", **options))
    with pytest.raises(ConfigError, match=r"healing\.mixed_precision may be auto, bf16 or no"):
        needs_of(small_job.config("out", healing_workers=2, **options))


def test_a_tiny_run_takes_as_long_as_its_processes_take_to_start(small_job: SmallJob, tmp_path: Path) -> None:
    for runner, least in (("ray", estimate.PROCESS_START_S), ("serial", 0.0)):
        needs = needs_of(small_job.config(tmp_path / "out", runner=runner))
        seconds = {each.name: each.seconds or 0.0 for each in needs.stages}
        for stage in ("calibrate", "compress", "measure"):
            assert least <= seconds[stage] < least + 1, (runner, stage)
