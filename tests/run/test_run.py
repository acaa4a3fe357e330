"""Whole runs on tiny models: what is published, what a second run does, and what a failure leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import ffsplit
from ffsplit import api
from ffsplit.calibration.statistics_file import read_statistics
from ffsplit.cli import main
from ffsplit.errors import ConfigError, FFSplitError, GateError
from ffsplit.run import driver, pipeline
from ffsplit.run.documents import render_published
from ffsplit.run.job import prepare
from ffsplit.run.stages import measure as measure_stage
from ffsplit.store import scratch
from ffsplit.store.commits import list_runs
from ffsplit.store.entries import StoreGuarantees
from ffsplit.store.local import LocalStore
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from tests.s3.fault_proxy import Fault, FaultProxy
from tests.small_jobs import LOW_RANK, SmallJob, digests
from tests.tiny_families import save_checkpoint
from tests.tiny_models import MAX_POSITIONS

WEIGHTS = ("*.safetensors", "stats/*.parquet", "config.json")


def test_a_run_is_published_whole(small_job: SmallJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = ffsplit.compress(small_job.config(out))
    attempt = out / manifest.run_key / manifest.attempt
    names = {path.relative_to(attempt).as_posix() for path in attempt.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "README.md", "report.html", "stats/neurons.parquet"} <= names
    assert names == {entry.path for entry in manifest.files} | {"manifest.json"}
    assert verify(str(out)).ok
    assert json.loads((out / "latest.json").read_text())["attempt"] == manifest.attempt
    assert not (out / ".scratch").exists()
    assert manifest.calibration.num_rows == 40
    assert manifest.calibration.held_out_is_disjoint
    assert [stage.name for stage in manifest.stages] == ["calibrate", "compress", "measure"]


def test_every_way_to_name_an_artifact_loads_one_model(small_job: SmallJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = small_job.recipe(heavy_share=0.5, step=LOW_RANK)
    manifest = ffsplit.compress(small_job.config(out, recipe=recipe))
    assert manifest.plain is False
    run = out / manifest.run_key
    attempt = run / manifest.attempt
    ids = torch.arange(6, 30).view(2, 12)
    with torch.no_grad():
        outputs = [ffsplit.load(str(uri))(ids)[0] for uri in (out, run, attempt)]
        outputs.append(AutoModel.from_pretrained(attempt)(ids)[0])
    assert all(torch.equal(outputs[0], each) for each in outputs[1:])


def test_keep_one_changes_nothing(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", keep=1.0))
    assert manifest.plain
    ids = torch.arange(6, 30).view(2, 12)
    with torch.no_grad():
        original = AutoModel.from_pretrained(small_job.model)(ids)[0]
        assert torch.equal(ffsplit.load(str(tmp_path / "out"))(ids)[0], original)
    assert manifest.measurements is not None
    assert manifest.measurements.fidelity["token_cosine"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("multiple", "width"), [(16, 32), (None, 47)])
def test_what_a_budget_gives_up_to_rounding_is_said_everywhere(
    small_job: SmallJob,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    multiple: int | None,
    width: int,
) -> None:
    """In the run's log, the manifest and the report; a result of a multiple loads as any other."""
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", width_multiple=multiple))
    assert {layer.layout.num_neurons for layer in manifest.layers} == {width}
    assert manifest.recipe["width_multiple"] == multiple and manifest.plain
    whole = 96 * 65 + 32
    assert manifest.keep == pytest.approx((width * 65 + 32) / whole)
    assert manifest.keep_unrounded == pytest.approx((47 * 65 + 32) / whole)
    said = "rounding widths gave up 0.1555 of the 0.4922 that the budget allows"
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    report, log = (attempt / "report.html").read_text("utf-8"), capsys.readouterr().err
    assert (said in report) == (multiple is not None)
    assert (f"width 32 of 96 neurons: keep 0.3367; {said}" in log) == (multiple is not None)
    assert AutoModel.from_pretrained(attempt).config.intermediate_size == width


def test_a_second_call_does_nothing(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_job.config(tmp_path / "out")
    first = ffsplit.compress(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    second = ffsplit.compress(config)
    assert second == first
    assert "committed already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_second_call_tokenizes_nothing(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tokens decide how many rows are read: the key is known without."""
    path = tmp_path / "few.yaml"
    given = Path(small_job.recipe()).read_text("utf-8")
    path.write_text(
        given.replace("held_out: 8", "held_out: 8, max_tokens: 100, held_out_tokens: 30"), "utf-8"
    )
    config = small_job.config(tmp_path / "out", recipe=str(path), samples=None)
    first = ffsplit.compress(config)
    assert first.calibration.num_rows < 40
    monkeypatch.setattr(driver, "check_inputs", None)
    assert ffsplit.compress(config) == first


def test_tasks_are_scored_for_both_models(small_job: SmallJob, tmp_path: Path) -> None:
    seen = small_job.text.read_text().splitlines()[0]
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f"{seen},at home,2\nmany people,one time,1\nfirst time,two years,4\n")
    config = small_job.config(tmp_path / "out", samples=60, eval=(f"sts:{pairs}",))
    manifest = ffsplit.compress(config)
    assert manifest.measurements is not None
    (score,) = manifest.measurements.tasks
    assert (score.name, score.metric, score.num_examples) == ("sts pairs.csv", "spearman", 3)
    in_sample = seen in prepare(config).text.calibration
    assert score.overlap_with_calibration == int(in_sample)
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    assert "| sts pairs.csv, spearman |" in (attempt / "README.md").read_text()
    assert "Task scores" in (attempt / "report.html").read_text()


def test_a_classifier_of_a_causal_family_runs_end_to_end(
    small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    model = checkpoint_of("llama", head="ForSequenceClassification")
    labels = tmp_path / "labels.tsv"
    labels.write_text("at home\t0\nmany people\t1\n")
    config = small_job.config(tmp_path / "out", model=str(model), eval=(f"classification:{labels}",))
    measured = ffsplit.compress(config).measurements
    assert measured is not None
    assert "token_cosine" in measured.fidelity
    assert [score.metric for score in measured.tasks] == ["accuracy", "f1"]


def test_heavy_hitters_by_energy_differ_from_layer_to_layer(small_job: SmallJob, tmp_path: Path) -> None:
    recipe = small_job.recipe(heavy_energy=0.6)
    manifest = ffsplit.compress(small_job.config(tmp_path / "out", recipe=recipe, keep=0.9))
    counts = [layer.num_heavy_hitters for layer in manifest.layers]
    assert len(set(counts)) > 1 and manifest.plain is False
    for layer, count in zip(manifest.layers, counts, strict=True):
        assert layer.neurons_for_energy is not None
        assert layer.neurons_for_energy["50"] <= count <= layer.neurons_for_energy["90"]
    kept = sum(layer.num_elements for layer in manifest.layers)
    assert manifest.model.shape is not None and manifest.keep is not None
    assert manifest.keep == kept / manifest.model.shape.ffn_elements < 0.9


def test_a_refused_result_is_taken_up_with_looser_gates(small_job: SmallJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    strict = ("token_cosine >= 0.9999", "size reduction >= 1%")
    with pytest.raises(GateError, match=r"1 of 2 gates not met.* token_cosine >= 0.9999: 0\.\d+, NOT met"):
        ffsplit.compress(small_job.config(out, gate=strict))
    assert {path.name for path in out.iterdir()} == {".scratch"}
    manifest = ffsplit.compress(small_job.config(out, gate=("token_cosine >= 0.1", "speedup@4x8 >= 0.001")))
    assert [(stage.name, stage.num_reused) for stage in manifest.stages] == [
        ("calibrate", 5),
        ("compress", 3),
        ("measure", 0),
    ]
    assert [(result.gate, result.met) for result in manifest.gates] == [
        ("speedup@4x8 >= 0.001", True),
        ("token_cosine >= 0.1", True),
    ]
    attempt = out / manifest.run_key / manifest.attempt
    for name in ("README.md", "report.html"):
        assert "token_cosine &gt;= 0.1" in (attempt / name).read_text().replace(">=", "&gt;=")
    (summary,) = list_runs(open_store(str(out)))
    assert summary.gates == {"speedup@4x8 >= 0.001": True, "token_cosine >= 0.1": True}
    assert not (out / ".scratch").exists()


def test_fresh_runs_beside_the_committed_run(small_job: SmallJob, tmp_path: Path) -> None:
    first = ffsplit.compress(small_job.config(tmp_path / "out"))
    second = ffsplit.compress(small_job.config(tmp_path / "out", fresh=True))
    assert second.run_key != first.run_key
    assert second.nonce is not None
    assert verify(f"{tmp_path}/out/{first.run_key}").ok


def test_a_failed_run_is_resumed_and_what_is_damaged_is_redone(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = ffsplit.compress(small_job.config(tmp_path / "undisturbed"))
    out = tmp_path / "out"

    def fail(*_: Any) -> None:
        raise FFSplitError("measured nothing")

    with monkeypatch.context() as patch:
        patch.setattr(measure_stage, "measure_job", fail)
        with pytest.raises(FFSplitError, match="measured nothing"):
            ffsplit.compress(small_job.config(out))
    assert not list(out.glob("*/commit.json"))
    scratch = out / ".scratch" / undisturbed.run_key
    for path in (scratch / "calibrate/shard-00001.parquet", scratch / "compress/layer-002.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    resumed = ffsplit.compress(small_job.config(out))
    assert [(stage.name, stage.num_items, stage.num_reused) for stage in resumed.stages] == [
        ("calibrate", 5, 4),
        ("compress", 3, 2),
        ("measure", 1, 0),
    ]
    assert digests(out, *WEIGHTS) == digests(tmp_path / "undisturbed", *WEIGHTS)
    assert not (out / ".scratch").exists()


def test_an_interrupted_run_commits_nothing(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "assemble", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ffsplit.compress(small_job.config(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".scratch"}
    with pytest.raises(ConfigError):
        verify(str(tmp_path / "out"))


def test_statistics_alone_never_move_latest(small_job: SmallJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = ffsplit.compress(small_job.config(out))
    hint = (out / "latest.json").read_bytes()
    statistics = api.calibrate(small_job.config(out))
    assert (out / "latest.json").read_bytes() == hint
    attempt = out / statistics.run_key / statistics.attempt
    assert {path.name for path in attempt.iterdir()} == {"manifest.json", "report.html", "stats"}
    of_model = out / model.run_key / model.attempt / "stats/neurons.parquet"
    assert of_model.read_bytes() == (attempt / "stats/neurons.parquet").read_bytes()


def test_published_statistics_say_what_they_are_of(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = ffsplit.compress(small_job.config(tmp_path / "out"))
    path = tmp_path / "out" / manifest.run_key / manifest.attempt / "stats/neurons.parquet"
    layers = read_statistics(path)
    assert {layer.num_tokens for layer in layers} == {manifest.calibration.num_tokens}
    lineage = json.loads(pq.read_schema(path).metadata[b"ffsplit.lineage"])
    assert lineage["model"] == manifest.model.digest
    assert lineage["text"] == manifest.calibration.text_digest


@pytest.mark.parametrize("family", ["llama", "opt", "distilbert"])
def test_other_families_run_end_to_end(
    family: str, small_job: SmallJob, tmp_path: Path, checkpoint_of: Any
) -> None:
    head = "" if family == "distilbert" else "ForCausalLM"
    config = small_job.config(tmp_path / "out", model=str(checkpoint_of(family, head=head)))
    manifest = ffsplit.compress(config)
    assert manifest.measurements is not None
    expected = {"token_cosine"} if family == "distilbert" else {"kl_divergence", "compressed_perplexity"}
    assert expected <= set(manifest.measurements.fidelity)
    assert type(ffsplit.load(str(tmp_path / "out"))).__name__ == manifest.model.architecture


@pytest.mark.s3
def test_a_run_is_published_to_s3(small_job: SmallJob, s3_uri: str) -> None:
    manifest = ffsplit.compress(small_job.config(s3_uri))
    assert verify(f"{s3_uri}/{manifest.run_key}").ok
    ids = torch.arange(6, 30).view(2, 12)
    with torch.no_grad():
        assert torch.isfinite(ffsplit.load(s3_uri)(ids)[0]).all()
    assert ffsplit.compress(small_job.config(s3_uri)) == manifest


@pytest.mark.s3
def test_an_outage_at_resume_is_an_outage(
    small_job: SmallJob, s3_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and nothing of what is finished is computed again; nor afterwards."""

    def fail(*_: Any) -> None:
        raise FFSplitError("measured nothing")

    with monkeypatch.context() as patch:
        patch.setattr(measure_stage, "measure_job", fail)
        with pytest.raises(FFSplitError, match="measured nothing"):
            ffsplit.compress(small_job.config(s3_uri))
    proxy = FaultProxy(int(os.environ["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]))
    proxy.faults.append(Fault("refused", 10**6, re.compile(rb"GET .*/\.scratch/.*/layer-\d+\.json").match))
    arguments = ["compress", *small_job.arguments(s3_uri, "--runner", "serial")]
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
        scratch._store.cache_clear()
        assert main(arguments) == 1
    proxy.close()
    scratch._store.cache_clear()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ffsplit: cannot read s3://") and "503" in last
    manifest = ffsplit.compress(small_job.config(s3_uri))
    assert [(stage.name, stage.num_items - stage.num_reused) for stage in manifest.stages] == [
        ("calibrate", 0),
        ("compress", 0),
        ("measure", 1),
    ]


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_another_finishes_first_is_done(
    fails: bool,
    small_job: SmallJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other one cleans up the scratch of both; where this one still comes to its end, it is too late."""
    config = small_job.config(tmp_path / "out")
    assemble = pipeline.assemble
    finished: list[ffsplit.Manifest] = []

    def finish_first(*arguments: Any, **options: Any) -> None:
        if not finished:
            finished.append(api.compress(small_job.config(tmp_path / "other")))
            (tmp_path / "other" / finished[0].run_key).rename(tmp_path / "out" / finished[0].run_key)
            if fails:
                raise FileNotFoundError("the scratch is gone")
        assemble(*arguments, **options)

    def finish_other(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(pipeline, "assemble", assemble)
        finish_first(*arguments, **options)

    monkeypatch.setattr(pipeline, "assemble", finish_other)
    manifest = ffsplit.compress(config)
    assert manifest.to_json() == finished[0].to_json() and manifest.path != finished[0].path
    assert ("by another run of the same key" in capsys.readouterr().err) == fails
    assert not (tmp_path / "out" / ".scratch").exists()


def test_a_second_call_corrects_the_hint_and_deletes_nothing(small_job: SmallJob, tmp_path: Path) -> None:
    """The scratch may be that of a run with other gates, which is at work or was refused."""
    out = tmp_path / "out"
    strict = ("token_cosine >= 0.9999",)
    manifest = ffsplit.compress(small_job.config(out))
    with pytest.raises(GateError):
        ffsplit.compress(small_job.config(out, gate=strict))
    scratch = out / ".scratch" / manifest.run_key
    before = sorted(path for path in scratch.rglob("*") if path.is_file())
    assert scratch / "refused/report.html" in before
    (out / "latest.json").unlink()
    ffsplit.compress(small_job.config(out))
    assert sorted(path for path in scratch.rglob("*") if path.is_file()) == before
    assert json.loads((out / "latest.json").read_text())["attempt"] == manifest.attempt


def test_a_run_that_ends_leaves_the_scratch_to_one_with_other_gates(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes when the last of them has ended, and no piece is computed twice."""
    out = tmp_path / "out"
    measure = measure_stage.measure_job
    ended: list[ffsplit.Manifest] = []

    def other_first(*arguments: Any) -> Any:
        monkeypatch.setattr(measure_stage, "measure_job", measure)
        ended.append(ffsplit.compress(small_job.config(out, gate=("token_cosine >= 0.2",))))
        assert (out / ".scratch").exists()
        return measure(*arguments)

    monkeypatch.setattr(measure_stage, "measure_job", other_first)
    manifest = ffsplit.compress(small_job.config(out, gate=("token_cosine >= 0.1",)))
    assert ended[0].run_key != manifest.run_key
    assert [stage.num_reused for stage in ended[0].stages] == [5, 3, 0]
    assert not (out / ".scratch").exists()


def test_a_report_that_cannot_be_written_is_a_mistake(small_job: SmallJob, tmp_path: Path) -> None:
    ffsplit.compress(small_job.config(tmp_path / "out"))
    for target in (tmp_path / "none" / "page.html", tmp_path):
        with pytest.raises(ConfigError, match=f"--out {target} cannot be written: "):
            render_published(str(tmp_path / "out"), out=str(target))


def test_statistics_of_many_shards_are_reduced_by_tasks(small_job: SmallJob, tmp_path: Path) -> None:
    """To what one shard gives: counts to the last one."""
    found = []
    for size in (1, 40):
        out = tmp_path / str(size)
        manifest = api.calibrate(small_job.config(out, recipe=small_job.recipe(shard_size=size)))
        layers = read_statistics(out / manifest.run_key / manifest.attempt / "stats/neurons.parquet")
        found.append(([stage.name for stage in manifest.stages], layers))
    (many, reduced), (one, whole) = found
    assert (many, one) == (["calibrate", "reduce"], ["calibrate"])
    for ours, theirs in zip(reduced, whole, strict=True):
        assert ours.num_tokens == theirs.num_tokens
        assert (ours.num_active == theirs.num_active).all()


def test_a_store_that_takes_two_commits_at_once_is_warned_of(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        LocalStore, "check_writable", lambda self: StoreGuarantees(conditional_put="not atomic", checksums=())
    )
    manifest = ffsplit.compress(small_job.config(tmp_path / "out"))
    assert f"warning: {tmp_path / 'out'} lets two writers create one key" in capsys.readouterr().err
    assert manifest.store is not None and manifest.store.conditional_put == "not atomic"


def test_what_is_longer_than_the_model_reads_is_refused(small_job: SmallJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--max-length 999 is more than the model's {MAX_POSITIONS} pos"):
        ffsplit.compress(small_job.config(tmp_path / "out", max_length=999))
    assert not (tmp_path / "out").exists()


def test_statistics_have_no_gates(small_job: SmallJob, tmp_path: Path) -> None:
    for fields in ({"gate": ("fidelity >= 0.9",)}, {"require_speedup": 1.1}):
        with pytest.raises(ConfigError, match="gates are for compress"):
            api.calibrate(small_job.config(tmp_path / "out", **fields))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("t5", {"more": "healing: {epochs: 1}"}, "healing and after_healing do not work for t5"),
        ("mixtral", {"more": "after_healing: {kind: quantize}"}, "do not work for mixtral"),
        ("t5", {"block_by_block": True}, "--block-by-block needs .* t5"),
    ],
)
def test_what_a_family_cannot_is_said_first(
    family: str, fields: dict[str, Any], expected: str, small_job: SmallJob, tmp_path: Path
) -> None:
    model = save_checkpoint(tmp_path / family, family)
    recipe = small_job.recipe(more=fields.pop("more", ""))
    with pytest.raises(ConfigError, match=expected):
        prepare(small_job.config(tmp_path / "out", model=str(model), recipe=recipe, **fields))


def test_pairs_of_nothing_are_refused(small_job: SmallJob, tmp_path: Path) -> None:
    """The tokenizer makes nothing of zero-width spaces."""
    model = save_checkpoint(tmp_path / "t5", "t5")
    small_job.text.write_text("\n".join("\u200b" * number for number in range(1, 21)), "utf-8")
    with pytest.raises(ConfigError, match="hold nothing that the model reads"):
        ffsplit.compress(small_job.config(tmp_path / "out", model=str(model)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpus_may_be_those_of_other_hosts(small_job: SmallJob, tmp_path: Path) -> None:
    """Then they are taken to fit in bfloat16, and nobody can say how fast they are."""
    recipe = small_job.recipe(step="{kind: prune}, {kind: distill, num_steps: 2}")
    fields: dict[str, Any] = {"device": "cuda", "recipe": recipe}
    run = prepare(small_job.config(tmp_path / "out", runner="ray", **fields))
    assert (run.profile.device, run.profile.dtype) == ("cuda", "bfloat16")
    assert run.recipe.fits_in_bfloat16
    assert run.needs.totals.seconds is None
    with pytest.raises(ConfigError, match="--device cuda: torch finds no GPU"):
        prepare(small_job.config(tmp_path / "out", **fields))


def test_nothing_is_written_into_a_published_attempt(small_job: SmallJob, tmp_path: Path) -> None:
    manifest = ffsplit.compress(small_job.config(tmp_path / "out"))
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    with pytest.raises(ConfigError, match="published attempt"):
        ffsplit.compress(small_job.config(attempt))
    with pytest.raises(ConfigError, match="published attempt"):
        render_published(str(tmp_path / "out"), out=str(attempt / "page.html"))
    assert verify(str(attempt)).ok


def test_weights_that_are_not_finite_are_named(small_job: SmallJob, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(small_job.model, spoilt)
    tensors = load_file(spoilt / "model.safetensors")
    tensors["encoder.layer.1.intermediate.dense.weight"][3, 4] = torch.nan
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"tensor encoder\.layer\.1\.intermediate\.dense\.weight holds NaN"):
        ffsplit.compress(small_job.config(tmp_path / "out", model=str(spoilt)))
    assert not (tmp_path / "out").exists()
