"""Exports to compressed-tensors load without ffsplit, with the same integers and the logits that follow."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ffsplit
from ffsplit.cli import main
from ffsplit.ffn.quantization import fake_quantize
from ffsplit.runtime.export_compressed_tensors import _patterns
from ffsplit.runtime.quantized_linear import QuantizedLinear
from ffsplit.store.pull import materialize
from tests import tiny_families
from tests.conftest import CheckpointFactory
from tests.runtime.conftest import CompressedFactory
from tests.small_jobs import LOW_RANK, SmallJob

pytest.importorskip("compressed_tensors")

LOADS = """
import sys

sys.modules["ffsplit"] = None  # an import of it fails
import json
import torch, transformers
from safetensors.torch import save_file

for directory, class_name, answer in json.load(open(sys.argv[1])):
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, found = getattr(transformers, class_name).from_pretrained(directory, **options)
    assert not found["missing_keys"], found
    with torch.no_grad():
        outputs = model.eval()(input_ids=torch.arange(5, 29).view(2, 12))[0]
    weights = {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    save_file({name: each.detach().clone() for name, each in weights.items()} | {"": outputs}, answer)
"""
IDS = torch.arange(5, 29).view(2, 12)
INT8, ATTENTION = "after_healing: {kind: quantize, num_bits: 8}", "\nlinears: int8"
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def export(source: Path, out: Path, *more: str) -> int:
    return main(["export", str(source), "--format", "compressed-tensors", "--out", str(out), *more])


def int4(group_size: int) -> str:
    return f"after_healing: {{kind: quantize, num_bits: 4, group_size: {group_size}, method: gptq}}"


class Case(NamedTuple):
    """A recipe's end, and what is to come of it."""

    family: str
    more: str
    scheme: str
    given: tuple[str, ...] = ()
    loaded_as: str = ""


CASES = {
    "int8 encoder": Case("bert", INT8 + ATTENTION, "W8A8"),
    "int8 decoder": Case("llama", INT8, "W8A8"),
    "int8 in groups": Case("qwen3", INT8.replace("8}", "8, group_size: 32}"), "W8A16"),
    "one fused matrix": Case("phi3", INT8 + ATTENTION, "W8A8"),
    "a base model": Case("qwen2", INT8, "W8A8", loaded_as="AutoModel"),
    "int8 weights alone": Case("bert", INT8 + ATTENTION, "W8A16", ("--scheme", "W8A16")),
    "int4": Case("qwen2", int4(32), "W4A16"),
    "int4, int8 attention": Case("mistral", int4(64) + ATTENTION, "W4A16"),
}
"""With groups all neurons stay: groups of 64 become groups of 32 in down projections of 96 columns."""


class Loaded(NamedTuple):
    """An export, its artifact, and what transformers alone makes of it."""

    case: Case
    artifact: Path
    export: Path
    outputs: Tensor
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def loaded(
    request: pytest.FixtureRequest,
    checkpoint_of: CheckpointFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Loaded]:
    """The cases that this session's tests ask for, loaded in one process that has no ffsplit."""
    items = [each for each in request.session.items if isinstance(each, pytest.Function)]
    names = {
        each.callspec.params["name"]
        for each in items
        if each.path == request.path and "name" in getattr(getattr(each, "callspec", None), "params", {})
    }
    made: dict[str, tuple[Case, Path, Path]] = {}
    jobs = []
    for name in sorted(names):
        case, folder = CASES[name], tmp_path_factory.mktemp("exported")
        if case.family == "phi3":
            source = tiny_families.save_checkpoint(folder / "model", "phi3", "ForCausalLM")
        else:
            head = "ForMaskedLM" if case.family == "bert" else "ForCausalLM"
            source = checkpoint_of(case.family, head=head, **SIZES)
        job = SmallJob(folder, source)
        keep = 1.0 if "group_size" in case.more else 0.76
        manifest = ffsplit.compress(job.config(folder / "out", recipe=job.recipe(more=case.more), keep=keep))
        made[name] = (case, folder / "out", folder / "export")
        assert export(folder / "out", folder / "export", *case.given) == 0
        class_name = case.loaded_as or manifest.model.architecture
        jobs.append([str(folder / "export"), class_name, str(folder / "answer")])
    answers = load_elsewhere(tmp_path_factory.mktemp("loads"), jobs)
    return {
        name: Loaded(*each, answer.pop(""), answer)
        for (name, each), answer in zip(made.items(), answers, strict=True)
    }


def load_elsewhere(folder: Path, jobs: list[list[str]]) -> list[dict[str, Tensor]]:
    """The outputs and weights of each (directory, class, answer), in a process without ffsplit."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "loads.py").write_text(LOADS)
    command = [sys.executable, folder / "loads.py", folder / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [load_file(answer) for *_, answer in jobs]


def ours(each: Loaded, *, in_floating_point: bool = False) -> Tensor:
    """What the artifact itself gives; `in_floating_point`: with dequantized matrices, as for gradients."""
    model = ffsplit.load(str(each.artifact), dtype=torch.float32)
    if each.case.loaded_as:
        model = model.base_model
    with torch.set_grad_enabled(in_floating_point):
        return model(input_ids=IDS)[0].detach()


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.subprocess
@pytest.mark.parametrize("name", CASES)
def test_integers_and_scales_are_carried_over_exactly(loaded: dict[str, Loaded], name: str) -> None:
    each = loaded[name]
    model = ffsplit.load(str(each.artifact))
    expected: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = module.float_weight(torch.float32)
            if path.endswith("gate_up") and each.case.family != "phi3":
                gate, up = weight.chunk(2)
                base = path.removesuffix("heavy.gate_up")
                expected |= {f"{base}gate_proj": gate, f"{base}up_proj": up}
            else:
                expected[path] = weight
    names = {
        "intermediate.dense.heavy.up": "intermediate.dense",
        "intermediate.dense.heavy.down": "output.dense",
        "mlp.heavy.down": "mlp.down_proj",
        "mlp.heavy.gate_up": "mlp.gate_up_proj",
    }
    for path, weight in expected.items():
        for old, new in names.items():
            path = path.replace(old, new)
        path = path.removeprefix("model.") if each.case.loaded_as else path
        assert torch.equal(each.weights[path], weight), path
    assert len(expected) >= 6


@pytest.mark.subprocess
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.scheme != "W8A8"])
def test_weights_alone_give_our_logits(loaded: dict[str, Loaded], name: str) -> None:
    """In floating point, sums of the same products in another order.

    Our kernels round inputs too, of 8-bit matrices to 8 bits and of 4-bit ones to bfloat16: 1 to 2 % here.
    """
    each = loaded[name]
    assert distance(each.outputs, ours(each, in_floating_point=True)) <= 1e-5
    assert distance(each.outputs, ours(each)) <= 0.05


@pytest.mark.subprocess
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.scheme == "W8A8"])
def test_rounded_inputs_give_our_logits(
    loaded: dict[str, Loaded], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With compressed-tensors' step for the inputs, which is their largest / 127.5, ours are the same.

    With our own, largest / 127, both are as far from products of unrounded inputs: at most twice that far
    from each other.
    """
    each = loaded[name]
    exact, rounded = ours(each, in_floating_point=True), ours(each)
    assert 0 < distance(each.outputs, exact) <= 1.5 * distance(rounded, exact)
    assert distance(each.outputs, rounded) <= 2 * distance(rounded, exact)

    def output(linear: QuantizedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127.5
        return linear._activated(linear._floating((x / step).round().clamp(-128, 127) * step, bias))

    monkeypatch.setattr(QuantizedLinear, "_output", output)
    assert distance(each.outputs, ours(each)) <= 1e-5


@pytest.mark.subprocess
@pytest.mark.parametrize("name", ["int8 encoder", "int4", "int4, int8 attention"])
def test_the_files_are_what_the_format_says(loaded: dict[str, Loaded], name: str) -> None:
    """Names, types and shapes of matrices; groups of modules and who is ignored; every other file."""
    each = loaded[name]
    config = json.loads((each.export / "config.json").read_text())
    settings = config["quantization_config"]
    found = {
        name.removeprefix("bert."): it for name, it in load_file(each.export / "model.safetensors").items()
    }
    groups = settings["config_groups"].values()
    inputs = {json.dumps(group["input_activations"]) for group in groups}
    weights = {
        (it["num_bits"], it["strategy"], it["group_size"]) for it in (group["weights"] for group in groups)
    }
    width = config["intermediate_size"]
    assert settings["quant_method"] == "compressed-tensors"
    if each.case.scheme == "W8A8":
        assert settings["format"] == "int-quantized" and weights == {(8, "channel", None)}
        (rounded,) = map(json.loads, inputs)
        assert (rounded["num_bits"], rounded["strategy"], rounded["dynamic"]) == (8, "token", True)
        matrix, scale = (found[f"encoder.layer.1.output.dense.{part}"] for part in ("weight", "weight_scale"))
        assert (
            (matrix.dtype, *matrix.shape) == (torch.int8, 64, width) and scale.shape == (64, 1) and width < 96
        )
        assert [group["targets"] for group in groups] == [["Linear"]]
    else:
        assert settings["format"] == "pack-quantized" and inputs == {"null"}
        down = {
            part: found[f"model.layers.1.mlp.down_proj.weight_{part}"]
            for part in ("packed", "scale", "shape")
        }
        assert (down["packed"].dtype, *down["packed"].shape) == (torch.int32, 64, width // 8) and width == 96
        assert down["scale"].shape == (64, 96 // 32) and down["shape"].tolist() == [64, 96]
        attention = {(8, "channel", None)} if "linears" in each.case.more else set()
        assert weights == {(4, "group", 32)} | attention | ({(4, "channel", None)} if attention else set())
    if "linears" in each.case.more:
        assert not any("attention" in pattern or "attn" in pattern for pattern in settings["ignore"])
    else:
        assert r"re:(?:.*\.)?layers\.\d+\.self_attn\.q_proj$" in settings["ignore"]
    assert (each.export / "tokenizer.json").is_file() and not (each.export / "README.md").exists()
    assert not [path for path in each.export.iterdir() if path.name.startswith((".", "manifest"))]


@pytest.mark.parametrize(
    ("scheme", "shapes"),
    [
        ("W8A8", {"up_proj.weight": (192, 128), "up_proj.weight_scale": (192, 1)}),
        ("W8A16", {"up_proj.weight_packed": (192, 32), "up_proj.weight_scale": (192, 1)}),
        ("W4A16", {"up_proj.weight_packed": (192, 16), "down_proj.weight_scale": (128, 3)}),
    ],
)
def test_a_plain_result_is_rounded_to_nearest(
    checkpoint_of: CheckpointFactory, tmp_path: Path, scheme: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    """With --scheme alone; in groups of 128, or of 64 where 128 do not divide a row of 192; only its FFNs."""
    from compressed_tensors.compressors import decompress_module
    from transformers import Qwen2ForCausalLM

    source = checkpoint_of("qwen2", head="ForCausalLM", hidden_size=128, intermediate_size=192)
    assert export(source, tmp_path / "new", "--scheme", scheme) == 0
    stored = load_file(tmp_path / "new" / "model.safetensors")
    for name, shape in shapes.items():
        assert stored[f"model.layers.2.mlp.{name}"].shape == shape
    original, model = (Qwen2ForCausalLM.from_pretrained(path) for path in (source, tmp_path / "new"))
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        expected = original.get_submodule(path).weight
        if ".mlp." in path:
            decompress_module(module)
            size = 64 if path.endswith("down_proj") else 128
            group_size = None if scheme == "W8A8" else size
            expected = fake_quantize(expected, num_bits=int(scheme[1]), group_size=group_size)
        torch.testing.assert_close(module.weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("more", "keep", "scheme"), [(INT8 + ATTENTION, 0.6, "W8A8"), (int4(64) + ATTENTION, 1.0, "W4A16")]
)
def test_a_trained_model(development_data: Path, tmp_path: Path, more: str, keep: float, scheme: str) -> None:
    """Of 320 columns and 864 neurons, in float16. The bounds are those of the tests above."""
    job = SmallJob(tmp_path, development_data / "tiny-llama")
    ffsplit.compress(job.config(tmp_path / "out", recipe=job.recipe(more=more), keep=keep))
    assert export(tmp_path / "out", tmp_path / "new") == 0
    jobs = [[str(tmp_path / "new"), "LlamaForCausalLM", str(tmp_path / "answer")]]
    (answer,) = load_elsewhere(tmp_path, jobs)
    each = Loaded(Case("llama", more, scheme), tmp_path / "out", tmp_path / "new", answer.pop(""), answer)
    exact, rounded = ours(each, in_floating_point=True), ours(each)
    if scheme == "W8A8":
        assert 0 < distance(each.outputs, exact) <= 1.5 * distance(rounded, exact)
        assert distance(each.outputs, rounded) <= 2 * distance(rounded, exact)
    else:
        assert distance(each.outputs, exact) <= 1e-5


SPLIT = "after_healing: {kind: quantize, num_bits: 4, group_size: 32, heavy_fraction: 0.3}"


def test_what_the_format_cannot_hold_is_one_line(
    checkpoint_of: CheckpointFactory,
    compressed_of: CompressedFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def artifact(name: str, more: str = "", width: int = 96, keep: float = 1, **options: Any) -> Path:
        (tmp_path / name).mkdir()
        sizes = SIZES | {"intermediate_size": width}
        job = SmallJob(tmp_path / name, checkpoint_of("qwen2", head="ForCausalLM", **sizes))
        ffsplit.compress(
            job.config(tmp_path / name / "out", recipe=job.recipe(more=more, **options), keep=keep)
        )
        return tmp_path / name / "out"

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}'
    )
    uneven = compressed_of("llama", recipe="fast", keep=(0.5, 0.25, 1.0)).directory
    biased = compressed_of("mistral", recipe="flap").directory
    gpt2 = tiny_families.save_checkpoint(tmp_path / "gpt2", "gpt2", "LMHeadModel")
    narrow = checkpoint_of("opt", head="ForCausalLM", ffn_dim=72)
    low_rank = artifact("low rank", step=LOW_RANK, keep=0.5, heavy_share=0)
    whole = artifact("int8", INT8)
    mixed = uneven_integers(whole, tmp_path / "mixed")
    cases = [
        (artifact("split", SPLIT), "", "heavy hitters in int8 and other neurons in int4 in groups of 32"),
        (low_rank, "", "is stored low rank"),
        (artifact("groups", int4(64), width=80), "", "rows of 80, which groups of 32 weights or more do not"),
        (whole, "W4A16", "would round integers again, which are stored for W8A8: omit --scheme"),
        (artifact("plain"), "", "is in floating point: give --scheme W8A8, W8A16 or W4A16"),
        (uneven, "", "to 64, which only ffsplit can load: compress with fast --plain"),
        (mixed, "", "have different widths, 48 to 96, which only ffsplit can load"),
        (biased, "", "has an output bias that only ffsplit can load"),
        (narrow, "W4A16", "rows of 72, which groups of 32"),
        (gpt2, "W8A8", "layer 0 is stored transposed"),
        (other, "", "is quantized already, and not by ffsplit"),
    ]
    for directory, scheme, said in cases:
        capsys.readouterr()
        assert export(directory, tmp_path / "new", *(["--scheme", scheme] if scheme else [])) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
        assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".export-*"))


def uneven_integers(artifact: Path, target: Path) -> Path:
    """A copy of an artifact whose config says that one layer was narrowed before it was rounded."""
    shutil.copytree(materialize(str(artifact)), target)
    (target / "manifest.json").unlink()
    config = json.loads((target / "config.json").read_text())
    (run,) = config["quantization_config"]["ffns"]
    narrow = copy.deepcopy(run) | {"count": 1}
    narrow["shape"]["num_neurons"] = narrow["layout"]["heavy"]["num_neurons"] = 48
    config["quantization_config"]["ffns"] = [narrow, run | {"count": run["count"] - 1}]
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_missing_library_and_a_misplaced_scheme(
    checkpoint_of: CheckpointFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, new = str(checkpoint_of("bert")), tmp_path / "new"
    capsys.readouterr()
    assert main(["export", model, "--format", "onnx", "--scheme", "W8A8", "--out", str(new)]) == 2
    said = "ffsplit: --scheme goes with --format compressed-tensors, not with onnx\n"
    assert capsys.readouterr().err == said
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert export(Path(model), new) == 2
    error = capsys.readouterr().err
    assert "needs compressed_tensors: pip install 'ffsplit[compressed-tensors]'" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_patterns_match_what_they_should() -> None:
    every = ["h.0.up", "h.1.up", "h.0.q", "h.1.q", "lm_head"]
    assert _patterns(["h.0.q", "h.1.q", "lm_head"], every) == [
        r"re:(?:.*\.)?h\.\d+\.q$",
        r"re:(?:.*\.)?lm_head$",
    ]
    assert _patterns(["h.0.up", "lm_head"], every) == [r"re:(?:.*\.)?h\.0\.up$", r"re:(?:.*\.)?lm_head$"]
