"""Graphs that onnxruntime's own tools made give what torch gives, and lie where loaders look for them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

import ffsplit
from ffsplit.cli import main
from ffsplit.models.load import load_whole_model
from ffsplit.runtime.export import export_onnx
from ffsplit.runtime.onnx_tools import FUSIONS, multiplies_int8, optimize_graph, quantize_graph
from tests.conftest import CheckpointFactory
from tests.runtime.test_export import INT8, generated
from tests.runtime.test_onnx_export import PAIRS, SMALL_EMBEDDING, save_pair_model, session_of
from tests.small_jobs import SmallJob
from tests.tiny_families import save_checkpoint as save_family

slow = pytest.mark.slow
TOLERANCE = {"model.onnx": 1e-5, "model_quantized.onnx": 0.1}
"""The relative error of all outputs together."""


def exported(model: Path, out: Path, *flags: str) -> Path:
    """The folder of the graphs."""
    assert main(["export", str(model), "--format", "onnx", "--out", str(out), *flags]) == 0
    return out / "onnx"


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(file)).graph.node)


def assert_pairs_agree(file: Path, model: Any, tokenizer: Any, *, tolerance: float) -> None:
    """Pairs of texts, padded, with token types where the model takes them."""
    session = session_of(file)
    names = {each.name for each in session.get_inputs()}
    for first, second in PAIRS:
        padding = isinstance(first, list)
        given = tokenizer(first, second, padding=padding, return_tensors="pt")
        feed = {name: value.numpy() for name, value in given.items() if name in names}
        with torch.no_grad():
            expected = model(**{name: given[name] for name in feed})[0].numpy()
        found = session.run(None, feed)[0]
        if found.shape[:2] == feed["attention_mask"].shape:
            kept = feed["attention_mask"].astype(bool)
            found, expected = found[kept], expected[kept]
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
        if "token_type_ids" in feed:
            assert feed["token_type_ids"].any()
            other = session.run(None, feed | {"token_type_ids": np.zeros_like(feed["token_type_ids"])})[0]
            assert abs(other.ravel()[: found.size] - found.ravel()[: other.size]).max() > 1e-3


@pytest.mark.parametrize("head", ["Model", pytest.param("ForSequenceClassification", marks=slow)])
def test_both_graphs_give_what_torch_gives_for_pairs(tmp_path: Path, head: str) -> None:
    model = save_pair_model(tmp_path / "model", "Bert", head)
    graphs = exported(tmp_path / "model", tmp_path / "out", "--optimize", "--quantize", "int8")
    assert sorted(path.name for path in graphs.iterdir()) == sorted(TOLERANCE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for name, tolerance in TOLERANCE.items():
        assert_pairs_agree(graphs / name, model, tokenizer, tolerance=tolerance)
    optimized, quantized = (operators(graphs / name) for name in TOLERANCE)
    assert optimized["BiasGelu"] == 2 and optimized["SkipLayerNormalization"] == 4
    assert optimized["MatMulInteger"] == 0 < optimized["MatMul"]
    assert quantized["MatMulInteger"] >= 2 * 6 and quantized["MatMul"] < optimized["MatMul"]


@pytest.mark.parametrize(
    ("flag", "name"),
    [(["--optimize"], "model.onnx"), ([], "model.onnx"), (["--quantize", "int8"], "model_quantized.onnx")],
)
def test_the_graph_that_was_asked_for_is_printed(
    tmp_path: Path,
    checkpoint_of: CheckpointFactory,
    capsys: pytest.CaptureFixture[str],
    flag: list[str],
    name: str,
) -> None:
    graphs = exported(checkpoint_of("distilbert"), tmp_path / "out", *flag)
    captured = capsys.readouterr()
    assert captured.out.endswith(f"{graphs / name}\n") and "WARNING" not in captured.err
    assert (operators(graphs / "model.onnx")["SkipLayerNormalization"] > 0) == (flag == ["--optimize"])
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


KNOWN = [
    pytest.param("Albert", SMALL_EMBEDDING, marks=slow),
    pytest.param("Camembert", {}, marks=slow),
    pytest.param("Electra", SMALL_EMBEDDING, marks=slow),
    pytest.param("MPNet", {}, marks=slow),
    pytest.param("Roberta", {}, marks=slow),
    pytest.param("XLMRoberta", {}, marks=slow),
]


@pytest.mark.parametrize(("prefix", "fields"), KNOWN)
def test_every_family_with_fusions_gives_what_torch_gives(
    tmp_path: Path, prefix: str, fields: dict[str, Any]
) -> None:
    model = save_pair_model(tmp_path / "model", prefix, "ForSequenceClassification", **fields)
    assert model.config.model_type in FUSIONS["bert"]
    graphs = exported(tmp_path / "model", tmp_path / "out", "--optimize", "--quantize", "int8")
    assert operators(graphs / "model.onnx")["SkipLayerNormalization"] > 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for name, tolerance in TOLERANCE.items():
        assert_pairs_agree(graphs / name, model, tokenizer, tolerance=tolerance)


@slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_keep_their_cache(tmp_path: Path, family: str) -> None:
    """GPT-2 gets fusions of its family, a Llama those of a session."""
    head = {"llama": "ForCausalLM", "gpt2": "LMHeadModel"}[family]
    directory = save_family(tmp_path / "model", family, head)
    graphs = exported(directory, tmp_path / "out", "--optimize", "--quantize", "int8")
    class_name = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    for found, expected in generated(graphs / "model.onnx", directory, class_name):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3)
    for found, expected in generated(graphs / "model_quantized.onnx", directory, class_name):
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    fused = {"llama": "QuickGelu", "gpt2": "SkipLayerNormalization"}[family]
    assert operators(graphs / "model.onnx")[fused] >= 2


@slow
def test_what_is_int8_already_stays_so(tmp_path: Path, checkpoint_of: CheckpointFactory) -> None:
    """The rest, embeddings among it, is quantized beside it."""
    job = SmallJob(tmp_path, checkpoint_of("bert"))
    manifest = ffsplit.compress(job.config(tmp_path / "run", recipe=job.recipe(more=INT8)))
    artifact = tmp_path / "run" / manifest.run_key / manifest.attempt
    graphs = exported(artifact, tmp_path / "out", "--optimize", "--quantize", "int8")
    model = load_whole_model(artifact, "BertModel", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact)
    for name, tolerance in (("model.onnx", 0.01), ("model_quantized.onnx", 0.05)):
        session = session_of(graphs / name)
        given = tokenizer(["the time of day", "people"], padding=True, return_tensors="pt")
        feed = {each.name: given[each.name].numpy() for each in session.get_inputs()}
        with torch.no_grad():
            expected = model(**{key: given[key] for key in feed})[0].numpy()
        kept = feed["attention_mask"].astype(bool)
        found = session.run(None, feed)[0]
        assert np.linalg.norm((found - expected)[kept]) <= tolerance * np.linalg.norm(expected[kept])
    assert operators(graphs / "model.onnx")["MatMulInteger"] >= 6 * 3


def test_loaders_find_both_by_their_names(tmp_path: Path, checkpoint_of: CheckpointFactory) -> None:
    """sentence-transformers by default, and by a file's name; transformers.js adds `_quantized` for `q8`."""
    utils = pytest.importorskip("sentence_transformers.backend.utils")
    graphs = exported(checkpoint_of("distilbert"), tmp_path / "out", "--quantize", "int8")
    assert graphs.name == "onnx" and (tmp_path / "out" / "tokenizer.json").is_file()
    for given, name in (
        ({}, "model.onnx"),
        ({"file_name": "model_quantized.onnx"}, "model_quantized.onnx"),
        ({"file_name": "onnx/model_quantized.onnx"}, "model_quantized.onnx"),
    ):
        found = utils.backend_should_export(
            tmp_path / "out", True, dict(given), "model.onnx", "*.onnx", "ONNX"
        )
        assert found == (False, {"subfolder": "onnx", "file_name": name})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimize"], "--optimize needs onnxruntime"),
        (["--quantize", "int8"], "--quantize int8 needs onnxruntime"),
    ],
)
def test_a_missing_library_is_one_line(
    tmp_path: Path,
    checkpoint_of: CheckpointFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    said: str,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = ["export", str(checkpoint_of("bert")), "--format", "onnx", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main([*arguments, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and "pip install 'ffsplit[onnx]'" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_quantization_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "x", "--format", "onnx", "--out", str(tmp_path / "o"), "--quantize", "int4"]) == 2
    error = capsys.readouterr().err
    assert "argument --quantize: invalid choice: 'int4'" in error and error.count("\n") == 1


def test_an_optimizer_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    checkpoint_of: CheckpointFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime.transformers.optimizer as optimizer

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such node\nin detail")

    monkeypatch.setattr(optimizer, "optimize_model", fail)
    model = str(checkpoint_of("bert"))
    capsys.readouterr()
    assert main(["export", model, "--format", "onnx", "--out", str(tmp_path / "out"), "--optimize"]) == 2
    error = capsys.readouterr().err
    assert "onnxruntime cannot optimize model.onnx: no such node" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["bert", "another"])
def test_weights_in_a_file_of_their_own_stay_in_one(
    tmp_path: Path, checkpoint_of: CheckpointFactory, family: str
) -> None:
    """As those above 2 GB are, by the optimizer's fusions and by a session's."""
    directory = checkpoint_of("bert")
    graph = export_onnx(directory, tmp_path / "model.onnx")
    model = onnx.load(str(graph))
    data = tmp_path / "model.onnx.data"
    onnx.save(model, str(graph), save_as_external_data=True, location=data.name)
    optimize_graph(graph, config={"model_type": family, "num_attention_heads": 4, "hidden_size": 32})
    assert graph.stat().st_size < data.stat().st_size
    quantized = quantize_graph(graph)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        "model_quantized.onnx",
        "model_quantized.onnx.data",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    loaded = load_whole_model(directory, "BertModel", dtype=torch.float32)
    for each, tolerance in ((graph, 1e-5), (quantized, 0.1)):
        assert_pairs_agree(each, loaded, tokenizer, tolerance=tolerance)


@pytest.mark.parametrize("flag", ["--optimize", "--quantize"])
def test_a_graph_that_gives_something_else_is_refused(
    tmp_path: Path,
    checkpoint_of: CheckpointFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
) -> None:
    """As a fusion would that takes a family for another: here the optimizer's scales are doubled."""
    import onnxruntime.quantization as quantization
    import onnxruntime.transformers.optimizer as optimizer

    def doubled(graph: onnx.GraphProto) -> None:
        for each in graph.initializer:
            if each.data_type == onnx.TensorProto.FLOAT:
                each.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(each), each.name))

    def wrongly(path: Any, *_: Any, **__: Any) -> Any:
        found = optimizer.OnnxModel(onnx.load(str(path)))
        doubled(found.model.graph)
        return found

    def quantized(path: Any, target: Any, **_: Any) -> None:
        model = onnx.load(str(path))
        doubled(model.graph)
        onnx.save(model, str(target))

    monkeypatch.setattr(optimizer, "optimize_model", wrongly)
    monkeypatch.setattr(quantization, "quantize_dynamic", quantized)
    flags = [flag] if flag == "--optimize" else [flag, "int8"]
    model = str(checkpoint_of("bert"))
    capsys.readouterr()
    assert main(["export", model, "--format", "onnx", "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert "differs from the model by" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_seven_bits_are_for_processors_whose_products_overflow() -> None:
    for features, is_able in (
        ({"architecture": "x86_64", "avx2": True, "avx_vnni": False, "avx512_vnni": False}, False),
        ({"architecture": "x86_64", "avx512_vnni": True}, True),
        ({"architecture": "x86_64", "avx_vnni": True}, True),
        ({"architecture": "aarch64", "neon": True}, True),
        ({}, False),
    ):
        assert multiplies_int8(features) == is_able
