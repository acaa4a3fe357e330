"""The command line: what it prints, its exit codes, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ffsplit
from ffsplit import logs
from ffsplit.cli import main
from ffsplit.cli.commands import job_config
from ffsplit.cli.entry import build_parser
from ffsplit.models.tensor_files import INDEX_NAME
from tests.small_jobs import SmallJob
from tests.tiny_families import save_checkpoint

Captured = pytest.CaptureFixture[str]


def test_json_prints_the_manifest_alone(small_job: SmallJob, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main(["compress", *small_job.arguments(out, "--runner", "serial", "--json")]) == 0
    printed = capsys.readouterr().out
    (path,) = out.glob("*/*/manifest.json")
    assert printed == path.read_text()
    assert json.loads(printed)["budget"] == {"kind": "keep", "limit": 0.5}


def test_a_run_prints_before_and_after(small_job: SmallJob, tmp_path: Path, capsys: Captured) -> None:
    assert main(["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")]) == 0
    captured = capsys.readouterr()
    for word in ("parameters", "weights", "p50", "token cosine", "report.html"):
        assert word in captured.out
    assert "calibrate: 5/5" in captured.err


def test_calibrate_publishes_statistics_and_logs_as_it_is_asked_to(
    small_job: SmallJob, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "text")
    for name, value in (("handlers", []), ("level", logs._logger.level), ("propagate", True)):
        monkeypatch.setattr(logs._logger, name, value)
    out = tmp_path / "out"
    flags = ["--runner", "serial", "--log-format", "json"]
    assert main(["calibrate", *small_job.arguments(out, *flags)]) == 0
    captured = capsys.readouterr()
    (path,) = out.glob("*/*/manifest.json")
    assert json.loads(path.read_text())["kind"] == "statistics"
    assert captured.out.startswith(f"artifact: {path.parent}\n")
    events = [json.loads(line)["event"] for line in captured.err.splitlines()]
    assert {"stage done", "publishing"} <= set(events)


def test_task_scores_are_printed_with_a_warning_where_they_flatter(
    small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    rows = small_job.text.read_text().splitlines()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("".join(f"{row},at home,{index}\n" for index, row in enumerate(rows)))
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial", "--eval", f"sts:{pairs}")
    assert main(["compress", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "sts pairs.csv, spearman" in printed
    assert "warning: 40 evaluation sentences of sts:pairs.csv are in the calibration text too" in printed


def test_a_result_that_is_refused_is_reported_and_not_published(
    small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    flags = ["--runner", "serial", "--gate", "token_cosine >= 0.1", "--require-speedup", "1000"]
    assert main(["compress", *small_job.arguments(out, *flags)]) == 3
    captured = capsys.readouterr()
    assert re.search(r"^gate token_cosine >= 0.1: 0\.\d+, met$", captured.out, re.MULTILINE)
    interval = r"\(99 % interval [\d.]+ to [\d.]+\)"
    assert re.search(rf"^gate speedup >= 1000: [\d.]+ {interval}, NOT met$", captured.out, re.MULTILINE)
    assert "artifact:" not in captured.out
    assert captured.err.splitlines()[-1].startswith("ffsplit: 1 of 2 gates not met, nothing was published:")
    assert {path.name for path in out.iterdir()} == {".scratch"}
    assert main(["compress", *small_job.arguments(out, *flags, "--json")]) == 3
    gates = json.loads(capsys.readouterr().out)["gates"]
    assert [gate["met"] for gate in gates] == [False, True]


def test_a_speed_gate_that_noise_could_decide_is_refused_as_undecided(
    small_job: SmallJob, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times that lie on both sides of the limit, however many are taken."""

    def paired_times(*calls: object, num_pairs: int, on_cuda: bool) -> Any:
        return np.stack([np.tile([0.6, 1.0, 3.0], num_pairs)[:num_pairs], np.ones(num_pairs)], axis=1)

    monkeypatch.setattr("ffsplit.measurement.latency.paired_times", paired_times)
    out = tmp_path / "out"
    flags = ["--runner", "serial", "--gate", "speedup@1x8 >= 0.99"]
    assert main(["compress", *small_job.arguments(out, *flags)]) == 3
    captured = capsys.readouterr()
    assert re.search(r"^gate speedup@1x8 >= 0.99: 1 \(99 % interval .*\), UNDECIDED$", captured.out, re.M)
    assert "warning: timings are noisy: at 1 \u00d7 8 tokens the original's p95 is 3.00 times" in captured.out
    said = captured.err.splitlines()[-1]
    assert said.startswith("ffsplit: 1 of 1 gates undecided, nothing was published: speedup@1x8 >= 0.99: 1 (")
    assert "quieter machine" in said and "latency_pairs" in said
    assert {path.name for path in out.iterdir()} == {".scratch"}


def test_verify_names_what_is_wrong(small_job: SmallJob, tmp_path: Path, capsys: Captured) -> None:
    manifest = ffsplit.compress(small_job.config(tmp_path / "out"))
    attempt = tmp_path / "out" / manifest.run_key / manifest.attempt
    assert main(["verify", str(tmp_path / "out")]) == 0
    (attempt / "vocab-extra.txt").write_text("not listed")
    (attempt / "config.json").write_text("{}")
    capsys.readouterr()
    assert main(["verify", str(attempt)]) == 1
    printed = capsys.readouterr().out
    assert "vocab-extra.txt" in printed
    assert "config.json" in printed


def test_report_writes_a_page(small_job: SmallJob, tmp_path: Path) -> None:
    ffsplit.compress(small_job.config(tmp_path / "out"))
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "out"), "--out", str(page)]) == 0
    assert "<html" in page.read_text()


@pytest.mark.slow
def test_benchmark_times_an_artifact_against_its_original(
    small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    ffsplit.compress(small_job.config(tmp_path / "out"))
    grid = ["--batch-sizes", "1", "--lengths", "4", "--pairs", "2", "--new-tokens", "2"]
    assert main(["benchmark", str(tmp_path / "out"), "--against", str(small_job.model), *grid]) == 0
    assert "tokens/s" in capsys.readouterr().out
    grid.append("--no-memory")
    assert main(["benchmark", str(small_job.model), *grid]) == 0
    assert main(["benchmark", str(tmp_path)]) == 2
    assert main(["benchmark", str(small_job.model), "--against", str(small_job.model), *grid]) == 0


def test_inspect_reads_headers_alone(small_job: SmallJob, capsys: Captured) -> None:
    assert main(["inspect", str(small_job.model)]) == 0
    printed = capsys.readouterr().out
    assert "3 FFNs" in printed and "32 -> 96 -> 32" in printed
    assert "0.3535" in printed


def test_inspect_shows_every_kind_of_ffn(tmp_path: Path, capsys: Captured) -> None:
    directory = save_checkpoint(tmp_path, "qwen2_moe", "ForCausalLM")
    capsys.readouterr()
    assert main(["inspect", str(directory)]) == 0
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row[0] in ("expert", "shared expert", "0.5")]
    assert rows[0][:4] == ["expert", "8 in 2 blocks", "16 -> 24 -> 16", "silu, gated"]
    assert rows[1][:4] == ["shared expert", "2", "16 -> 40 -> 16", "silu, gated"]
    assert rows[2][:2] == ["0.5", "width 8 / width 20"]


def test_help_lists_the_exit_codes(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    assert "3    completed, but a gate failed" in capsys.readouterr().out


BAD_FLAGS: dict[str, tuple[list[str], str]] = {
    "keep above one": (["--keep", "1.5"], "--keep"),
    "keep zero": (["--keep", "0"], "--keep"),
    "keep not a number": (["--keep", "half"], "--keep"),
    "keep is nan": (["--keep", "nan"], "--keep"),
    "keep too small": (["--keep", "0.001"], "the smallest is 0."),
    "two budgets": (["--max-bytes", "9000"], "--keep and --max-bytes are 2 budgets: give one"),
    "no bytes": (["--max-bytes", "0"], "--max-bytes"),
    "a table without a target": (["--latency-table", "t.json"], "--latency-table is for --max-latency-ms"),
    "no statistics": (["--stats", "nowhere"], "nowhere holds no artifact"),
    "no samples": (["--samples", "0"], "--samples"),
    "no workers": (["--workers", "-1"], "--workers"),
    "no length": (["--max-length", "0"], "--max-length"),
    "only special tokens fit": (["--max-length", "2"], "--max-length 2"),
    "not even those fit": (["--max-length", "1"], "give 3 or more"),
    "seed beyond 32 bits": (["--seed", "99999999999999"], "--seed"),
    "a name that no disk takes": (["--out", "/tmp/" + "a" * 300], "--out"),
    "inside an attempt": (["--out", "runs/0123456789abcdef/0123456789ab/x"], "published attempt"),
    "unknown recipe": (["--recipe", "fats"], "did you mean 'fast'"),
    "recipe file missing": (["--recipe", "none.yaml"], "none.yaml does not exist"),
    "unknown scheme": (["--calibration", "ftp://text"], "unknown scheme"),
    "calibration missing": (["--calibration", "none.txt"], "none.txt"),
    "unknown flag": (["--keeep", "0.5"], "--keeep"),
    "out is below a file": (["--out", "/dev/null/out"], "/dev/null"),
    "out of an unknown scheme": (["--out", "gs://bucket"], "gs://"),
    "revision of a directory": (["--revision", "main"], "--revision"),
    "a gate without a limit": (["--gate", "fidelity"], "the forms are"),
    "a gate on nothing known": (["--gate", "poled_cosine >= 0.9"], "did you mean 'pooled_cosine'"),
    "a gate the wrong way": (["--gate", "fidelity <= 0.9"], "write fidelity >= 0.9"),
    "a gate that is no number": (["--gate", "fidelity >= high"], "'high' is not a number"),
    "a gate on another kind": (["--gate", "top1_agreement >= 0.9"], "for an encoder, pooled_cosine"),
    "a gate on no task": (["--gate", "sts drop <= 1"], "no --eval scores 'sts'"),
    "a gate on what is not measured": (["--gate", "memory reduction >= 5%"], "peak_memory"),
    "a gate on too long rows": (["--gate", "speedup@1x999 >= 1"], "at most 160 tokens per row"),
    "a gate on what a block does not tell": (
        ["--block-by-block", "--require-speedup", "1"],
        "with --block-by-block only fidelity and size are measured",
    ),
    "no speed-up": (["--require-speedup", "0"], "--require-speedup"),
    "contradiction": (["--device", "cpu", "--gpus-per-worker", "1"], "contradict"),
    "no such device": (["--device", "tpu"], "--device"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    name: str, small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    flags, expected = BAD_FLAGS[name]
    out = tmp_path / "out"
    before = set(tmp_path.rglob("*"))
    code = main(["compress", *small_job.arguments(out, "--runner", "serial", *flags)])
    assert_one_line(code, expected, capsys)
    assert set(tmp_path.rglob("*")) - before <= {Path(small_job.recipe())}


@pytest.mark.parametrize("flag", ["--max-bytes", "--max-parameters"])
def test_a_budget_too_small_names_the_smallest(
    flag: str, small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    given = small_job.arguments(tmp_path / "out", "--runner", "serial", flag, "10")
    given = [each for each in given if each not in ("--keep", "0.5")]
    assert_one_line(main(["compress", *given]), f"{flag} 10 is too small", capsys)
    assert not (tmp_path / "out").exists()


def assert_one_line(code: int, expected: str, capsys: Captured) -> None:
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize("runner", ["serial", "ray"])
@pytest.mark.parametrize("command", ["compress", "calibrate", "benchmark", "latency-table"])
def test_a_dtype_that_the_device_lacks_is_refused(
    small_job: SmallJob, tmp_path: Path, capsys: Captured, monkeypatch: Any, command: str, runner: str
) -> None:
    """As torch refuses float16 on a processor that it has no product of such matrices for."""
    product = torch.Tensor.__matmul__

    def without_halves(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", without_halves)
    arguments = {
        "benchmark": [str(small_job.model)],
        "latency-table": [str(small_job.model), "--out", str(tmp_path / "out")],
    }.get(command, [*small_job.arguments(tmp_path / "out"), "--runner", runner])
    code = main([command, *arguments, "--device", "cpu", "--dtype", "float16"])
    assert_one_line(code, "--dtype float16: this machine's CPU does not support it", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_the_machine_lacks_is_refused(
    small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial", "--device", "cuda")
    assert_one_line(main(["compress", *arguments]), "--device cuda: torch finds no GPU", capsys)
    assert not (tmp_path / "out").exists()


BAD_MODELS: dict[str, str] = {
    "missing": "does not exist",
    "no config": "config.json",
    "pickle only": "safetensors",
    "unknown family": "shows no FFN of two or three linear layers in its blocks",
    "truncated": "not a whole safetensors file",
    "missing shard": "model-00002-of-00002.safetensors is missing",
    "absent tensor": "names ghost.weight, which model-00001-of-00001.safetensors does not hold",
    "not a number": "tensor encoder.layer.2.output.dense.weight holds NaN",
    "no attention": "holds no tensor for encoder.layer.1.attention.self.query.weight",
    "another shape": "self.query.weight has the shape (8, 32), config.json implies (32, 32)",
    "no config of its family": "config.json is invalid",
    "another tokenizer": "the tokenizer does not belong to the model",
    "no tokenizer": "tokenizer",
    "compressed already": "original",
    "no number of layers": "num_hidden_layers",
    "another width": "config.json says intermediate_size",
    "unknown class": "has no class MyBert",
}


BAD_EVALUATIONS: dict[str, tuple[str, str, str]] = {
    "unknown task": ("stt:", "", "did you mean 'sts:'"),
    "file missing": ("sts:none-", "", "does not exist"),
    "file empty": ("sts:", "", "the file is empty"),
    "wrong columns": ("sts:", "a,b\n", "expected 3 columns"),
    "score not a number": ("sts:", "a b,c d,1\na b,c d,high\n", ":2: the score 'high' is not a number"),
    "constant score": ("sts:", "a b,c d,1\ne f,g h,1\n", "a ranking needs scores that differ"),
    "no head": ("classification:", "a b,1\n", "not BertModel"),
    "no language model": ("perplexity:", "a b\n", "needs a causal language model"),
    "no harness for encoders": ("lm-eval:", "", "needs a causal language model"),
}


@pytest.mark.parametrize("name", BAD_EVALUATIONS)
def test_a_bad_evaluation_is_one_line_and_exit_code_2(
    name: str, small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    prefix, content, expected = BAD_EVALUATIONS[name]
    path = tmp_path / "eval.csv"
    path.write_text(content)
    spec = f"{prefix}{path}".replace("none-/", "/none")
    out = tmp_path / "out"
    flags = ["--runner", "serial", "--eval", spec]
    assert_one_line(main(["compress", *small_job.arguments(out, *flags)]), expected, capsys)
    assert not out.exists()


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_one_line_and_exit_code_2(
    name: str, small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    model = tmp_path / "model"
    if name != "missing":
        shutil.copytree(small_job.model, model)
        spoil(model, name)
    small_job.model = model
    code = main(["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")])
    assert_one_line(code, BAD_MODELS[name], capsys)
    assert not (tmp_path / "out").exists()


def test_blocks_that_the_config_does_not_state_are_named(
    small_job: SmallJob, tmp_path: Path, capsys: Captured
) -> None:
    path = small_job.model / "config.json"
    small_job.model = Path(shutil.copytree(small_job.model, tmp_path / "model"))
    (small_job.model / path.name).write_text(
        json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1})
    )
    assert main(["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")]) == 0
    assert "fewer blocks: encoder.layer.1, encoder.layer.2 are copied unchanged" in capsys.readouterr().err


CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "no number of layers": {"num_hidden_layers": None},
    "another width": {"intermediate_size": 1000},
    "another tokenizer": {"vocab_size": 50},
    "no config of its family": {"num_attention_heads": "four"},
    "unknown class": {"architectures": ["MyBert"]},
}


def spoil(model: Path, name: str) -> None:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    weights = model / "model.safetensors"
    if name == "no config":
        (model / "config.json").unlink()
    elif name == "pickle only":
        weights.rename(model / "pytorch_model.bin")
    elif name == "unknown family":
        (model / "config.json").write_text(json.dumps(config | {"model_type": "resnet"}))
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif name == "missing shard":
        index = dict.fromkeys(load_file(weights), "model-00001-of-00002.safetensors")
        index["ghost.weight"] = "model-00002-of-00002.safetensors"
        weights.rename(model / "model-00001-of-00002.safetensors")
        (model / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    elif name == "absent tensor":
        index = dict.fromkeys([*load_file(weights), "ghost.weight"], "model-00001-of-00001.safetensors")
        weights.rename(model / "model-00001-of-00001.safetensors")
        (model / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    elif name == "not a number":
        tensors = load_file(weights)
        tensors["encoder.layer.2.output.dense.weight"][-1, -1] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    elif name == "no attention":
        tensors = load_file(weights)
        del tensors["encoder.layer.1.attention.self.query.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif name == "another shape":
        tensors = load_file(weights)
        tensors["encoder.layer.1.attention.self.query.weight"] = torch.zeros(8, 32)
        save_file(tensors, weights, {"format": "pt"})
    elif name == "no tokenizer":
        for path in model.glob("*token*"):
            path.unlink()
    elif name in CONFIG_CHANGES:
        (model / "config.json").write_text(json.dumps(config | CONFIG_CHANGES[name]))
    elif name == "compressed already":
        quantized = config | {"quantization_config": {"quant_method": "ffsplit"}}
        (model / "config.json").write_text(json.dumps(quantized))


def test_padding_alone_is_refused(small_job: SmallJob, tmp_path: Path, capsys: Captured) -> None:
    small_job.text.write_text("[PAD] [PAD]\n[PAD]\n")
    code = main(["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")])
    assert_one_line(code, "nothing but padding", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres", "m"], "unknown command 'compres', did you mean 'compress'?"),
        (["xyzzy"], "unknown command 'xyzzy': ffsplit alone lists them"),
        (
            ["gc", "o", "--keep", "0", "--delete"],
            "unrecognized arguments: --keep, did you mean '--keep-last'?",
        ),
        (
            ["compress", "m", "--out", "o", "--kep", "0.5"],
            "unrecognized arguments: --kep 0.5, did you mean '--keep'?",
        ),
        (["compress", "m", "--out", "o", "--device", "cud"], "did you mean 'cuda'?"),
        (
            ["compress", "m", "--out", "o", "--keep", "x%"],
            "--keep must be a number such as 0.35 or 35%, not 'x%'",
        ),
        (["plan", "u", "--max-bytes", "5XB"], "--max-bytes must be a size such as 500MB or 50GB, not '5XB'"),
    ],
)
def test_a_slip_is_told_with_what_was_meant(arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_sizes_and_shares_as_people_write_them() -> None:
    for given, field, value in (
        ("35%", "keep", 0.35),
        ("5MB", "max_bytes", 5_000_000),
        ("9", "max_bytes", 9),
    ):
        parsed = build_parser().parse_args(
            ["compress", "m", "--out", "o", f"--{field.replace('_', '-')}", given]
        )
        assert getattr(job_config(parsed), field) == value
