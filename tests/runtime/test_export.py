"""What is exported runs elsewhere with the same outputs: onnxruntime, sentence-transformers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import ffsplit
from ffsplit.cli import main
from ffsplit.models.load import load_whole_model
from ffsplit.runtime import export
from ffsplit.runtime.quantized_linear import QuantizedLinear
from tests.conftest import CheckpointFactory
from tests.runtime.compressed import head_of
from tests.runtime.conftest import CompressedFactory
from tests.small_jobs import SmallJob
from tests.tiny_models import CAUSAL

SHAPES = ((2, 7), (1, 1), (3, 20))
INT8 = "after_healing: {kind: quantize, num_bits: 8}\nlinears: int8"


@pytest.fixture
def int8_artifact(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    def make(family: str) -> tuple[Path, str]:
        job = SmallJob(tmp_path, checkpoint_of(family, head=head_of(family)))
        manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=job.recipe(more=INT8)))
        return tmp_path / "out" / manifest.run_key / manifest.attempt, manifest.model.architecture

    return make


def compared(file: Path, directory: Path, class_name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Outputs of the torch model and of onnxruntime, at several shapes and with padding."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model = load_whole_model(directory, class_name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for shape in SHAPES:
        ids = torch.randint(5, 190, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask)[0].numpy()
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        keep = mask.bool().numpy() if found.ndim == 3 else slice(None)
        pairs.append((found[keep], expected[keep]))
    return pairs


def generated(file: Path, directory: Path, class_name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits of a causal model, a prompt first and then token by token; each row has padding of its own.

    What is expected is the torch model's for each row alone, without padding.
    """
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model = load_whole_model(directory, class_name, dtype=torch.float32)
    (past_names, present_names) = (
        [each.name for each in of if each.name.startswith(prefix)]
        for of, prefix in ((session.get_inputs(), "past_key_values."), (session.get_outputs(), "present."))
    )
    assert [name.removeprefix("past_key_values.") for name in past_names] == [
        name.removeprefix("present.") for name in present_names
    ]
    shapes = [each.shape for each in session.get_inputs() if each.name in past_names]
    pairs = []
    for rows, prompt, new in ((1, 1, 3), (3, 7, 2)):
        ids = torch.randint(5, 190, (rows, prompt + new), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : min(row, prompt - 1)] = 0
        past = [np.zeros((rows, shape[1], 0, shape[3]), np.float32) for shape in shapes]
        logits = []
        for start, stop in ((0, prompt), *((i, i + 1) for i in range(prompt, prompt + new))):
            feed = {"input_ids": ids[:, start:stop].numpy(), "attention_mask": mask[:, :stop].numpy()}
            found, *past = session.run(None, feed | dict(zip(past_names, past, strict=True)))
            logits.append(found)
        for row, found in enumerate(np.concatenate(logits, axis=1)):
            kept = mask[row].bool()
            with torch.no_grad():
                expected = model(input_ids=ids[row, kept][None]).logits[0].numpy()
            pairs.append((found[kept.numpy()], expected))
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize(("family", "recipe"), [("bert", "paper"), ("llama", "svd"), ("opt", "fast")])
def test_floating_point_models(
    compressed_of: CompressedFactory, tmp_path: Path, family: str, recipe: str
) -> None:
    compressed = compressed_of(family, recipe=recipe)
    assert main(["export", str(compressed.directory), "--format", "onnx", "--out", str(tmp_path / "o")]) == 0
    outputs = generated if family in CAUSAL else compared
    for found, expected in outputs(
        tmp_path / "o" / "onnx" / "model.onnx", compressed.directory, compressed.source.class_name
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3)
    assert (tmp_path / "o" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_int8_stays_int8(int8_artifact: Any, tmp_path: Path, family: str) -> None:
    import onnx

    directory, class_name = int8_artifact(family)
    assert main(["export", str(directory), "--format", "onnx", "--out", str(tmp_path / "o")]) == 0
    graph = onnx.load(str(tmp_path / "o" / "onnx" / "model.onnx")).graph
    model = load_whole_model(directory, class_name)
    num_linears = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == num_linears > 0
    stored = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert len([tensor for tensor in stored if len(tensor.dims) == 2]) == num_linears
    outputs = generated if family in CAUSAL else compared
    for found, expected in outputs(tmp_path / "o" / "onnx" / "model.onnx", directory, class_name):
        assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)
    if family not in CAUSAL:
        assert_alone_as_in_company(tmp_path / "o" / "onnx" / "model.onnx", model)


def assert_alone_as_in_company(file: Path, model: Any) -> None:
    """What an int8 encoder gives of a row does not depend on the others of its batch, here or there."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    ids = torch.randint(5, 190, (6, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.base_model.get_input_embeddings().weight[ids[-1]] *= (
            50  # not in the file, where it is as it was
        )
        runs: list[Callable[[torch.Tensor], np.ndarray]] = [
            lambda rows: model(input_ids=rows)[0].numpy(),
            lambda rows: session.run(
                None, {"input_ids": rows.numpy(), "attention_mask": torch.ones_like(rows).numpy()}
            )[0],
        ]
        for run in runs:
            together = run(ids)
            for row in range(len(ids)):
                alone = run(ids[row : row + 1])[0]
                np.testing.assert_allclose(alone, together[row], atol=1e-6, rtol=1e-6)


def test_mistakes_are_one_line(
    checkpoint_of: CheckpointFactory, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """A full directory, no artifact, an unknown format, a missing extra: nothing is written."""
    model = str(checkpoint_of("bert"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    onnx = ("--format", "onnx", "--out")
    cases = [
        ((model, *onnx, str(tmp_path / "full")), "full holds file already: give a directory per export"),
        ((model, *onnx, str(tmp_path / "full/file")), "full/file is a file: give a new or empty directory"),
        ((str(tmp_path / "full"), *onnx, str(tmp_path / "new")), "holds no artifact"),
        ((model, "--format", "gguf", "--out", str(tmp_path / "new")), "invalid choice: 'gguf'"),
    ]
    capsys.readouterr()  # of making the model
    for arguments, said in cases:
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", model, *onnx, str(tmp_path / "new")]) == 2
    assert "pip install 'ffsplit[onnx]'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_second_export_tells_which_is_there(
    checkpoint_of: CheckpointFactory, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Also where another export was faster."""
    model, out = str(checkpoint_of("bert")), tmp_path / "out"
    capsys.readouterr()
    for format, scheme, found in (
        ("onnx", [], "an ONNX export (model.onnx)"),
        ("compressed-tensors", ["--scheme", "W8A8"], "a compressed-tensors export"),
    ):
        arguments = ["export", model, "--format", format, *scheme, "--out", str(out)]
        assert main(arguments) == 0
        capsys.readouterr()
        line = f"--out {out} holds {found} already: give a directory per export, or delete this one first"
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"ffsplit: {line}\n"
        checks = iter([lambda _: None, export._check_is_free])
        monkeypatch.setattr(export, "_check_is_free", lambda out, checks=checks: next(checks)(out))
        assert main(arguments) == 2
        assert capsys.readouterr().err.endswith(f"{line}\n")
        monkeypatch.undo()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        shutil.rmtree(out)


def test_four_bits_are_refused(checkpoint_of: CheckpointFactory, tmp_path: Path, capsys: Any) -> None:
    job = SmallJob(tmp_path, checkpoint_of("bert"))
    recipe = job.recipe(more="after_healing: {kind: quantize, num_bits: 4, group_size: 32}")
    ffsplit.compress(job.config(tmp_path / "out", recipe=recipe))
    assert main(["export", str(tmp_path / "out"), "--format", "onnx", "--out", str(tmp_path / "new")]) == 2
    assert "4-bit weights" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("more", ["", INT8])
def test_sentence_transformers_loads_a_compressed_encoder(
    checkpoint_of: CheckpointFactory, tmp_path: Path, more: str
) -> None:
    """Its modules.json and pooling are kept, and the embedding is the pooled state of the model."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = tmp_path / "sentence"
    shutil.copytree(checkpoint_of("bert"), source)
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    job = SmallJob(tmp_path, source)
    manifest = ffsplit.compress(job.config(tmp_path / "out", recipe=job.recipe(more=more)))
    directory = tmp_path / "out" / manifest.run_key / manifest.attempt
    texts = ["the time of day", "people like to work in the world"]
    loaded = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    found = loaded.encode(texts, batch_size=1, convert_to_tensor=True)
    model = load_whole_model(directory, manifest.model.architecture)
    for text, embedding in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(**loaded.tokenizer([text], return_tensors="pt"))[0]
        torch.testing.assert_close(embedding, states.mean(1)[0], atol=1e-5, rtol=1e-5)
