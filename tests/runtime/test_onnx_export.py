"""Whatever a tokenizer gives is an input of the graph: pairs of texts, every head, sentence models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import save_file

from ffsplit.cli import main
from ffsplit.models.load import load_whole_model
from tests.conftest import CheckpointFactory
from tests.runtime.test_export import generated
from tests.tiny_families import save_checkpoint as save_family
from tests.tiny_models import VOCAB_SIZE, randomize, save_tokenizer

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
DEBERTA |= {"position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}
SMALL_EMBEDDING = {"embedding_size": 16}
slow = pytest.mark.slow
MODELS = [
    pytest.param("Bert", "ForSequenceClassification", {"num_labels": 1}, marks=slow),
    pytest.param("Bert", "ForSequenceClassification", {"num_labels": 3}),
    pytest.param("Bert", "ForQuestionAnswering", {}, marks=slow),
    pytest.param("Bert", "ForTokenClassification", {"num_labels": 5}, marks=slow),
    pytest.param("Bert", "ForNextSentencePrediction", {}, marks=slow),
    pytest.param("Bert", "Model", {}, marks=slow),
    pytest.param("Electra", "ForSequenceClassification", SMALL_EMBEDDING, marks=slow),
    pytest.param("Albert", "ForSequenceClassification", SMALL_EMBEDDING, marks=slow),
    pytest.param("Roberta", "ForSequenceClassification", {}, marks=slow),
    pytest.param("DebertaV2", "ForSequenceClassification", DEBERTA, marks=slow),
    pytest.param("DebertaV2", "ForSequenceClassification", DEBERTA | {"type_vocab_size": 0}, marks=slow),
    pytest.param("GPT2", "ForSequenceClassification", GPT2, marks=slow),
]
PAIRS: tuple[tuple[Any, Any], ...] = (
    ("the time", "people like to work in the world"),
    (["a b c", "the time of day is now"], ["when did people work", "x"]),
    ("a", "b"),
)


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tell_pairs_apart(directory: Path) -> None:
    """Have a tokenizer give token types, 1 for what follows the second text's start."""
    change_json(
        directory / "tokenizer_config.json",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    post = json.loads((directory / "tokenizer.json").read_text())["post_processor"]
    for piece in post["pair"][3:]:
        for part in piece.values():
            part["type_id"] = 1
    change_json(directory / "tokenizer.json", post_processor=post)


def save_pair_model(directory: Path, prefix: str, head: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | fields))
    model = getattr(transformers, prefix + head)(config)
    randomize(model, seed=0)
    model.eval().save_pretrained(directory)
    save_tokenizer(directory)
    tell_pairs_apart(directory)
    return model


def session_of(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("prefix", "head", "fields"), MODELS)
def test_pairs_give_what_torch_gives(tmp_path: Path, prefix: str, head: str, fields: dict[str, Any]) -> None:
    model = save_pair_model(tmp_path / "model", prefix, head, **fields)
    out = tmp_path / "onnx"
    assert main(["export", str(tmp_path / "model"), "--format", "onnx", "--out", str(out)]) == 0
    session, tokenizer = (
        session_of(out / "onnx" / "model.onnx"),
        transformers.AutoTokenizer.from_pretrained(out),
    )
    names = [each.name for each in session.get_outputs()]
    assert names == (
        ["start_logits", "end_logits"]
        if head == "ForQuestionAnswering"
        else ["last_hidden_state" if head == "Model" else "logits"]
    )
    for first, second in PAIRS:
        padding = isinstance(first, list)
        feed = dict(tokenizer(first, second, padding=padding, return_tensors="np"))
        assert feed["token_type_ids"].any()
        with torch.no_grad():
            expected = model(**tokenizer(first, second, padding=padding, return_tensors="pt"))
        found = session.run(None, feed)
        kept = feed["attention_mask"].astype(bool)
        for name, output in zip(names, found, strict=True):
            true = expected[name].numpy()
            per_token = true.shape[:2] == kept.shape
            np.testing.assert_allclose(
                output[kept] if per_token else output, true[kept] if per_token else true, atol=1e-5
            )
        if fields.get("type_vocab_size") != 0:
            one_text = feed | {"token_type_ids": np.zeros_like(feed["token_type_ids"])}
            assert any(
                abs(a - b).max() > 1e-3 for a, b in zip(session.run(None, one_text), found, strict=True)
            )


def test_an_input_that_the_model_does_not_take_is_none_of_the_graph(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    """DistilBERT knows no token types; BERT's own tokenizer in its place would give them.

    The graph goes into a directory that is there already, and empty.
    """
    (tmp_path / "onnx").mkdir()
    directory = tmp_path / "model"
    transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=VOCAB_SIZE, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
    ).save_pretrained(directory)
    save_tokenizer(directory)
    tell_pairs_apart(directory)
    assert main(["export", str(directory), "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    inputs = session_of(tmp_path / "onnx" / "onnx" / "model.onnx").get_inputs()
    assert {each.name for each in inputs} == {"input_ids", "attention_mask"}


@pytest.mark.slow
def test_a_cache_takes_token_types_too(tmp_path: Path) -> None:
    """GPT-2 embeds them, where its tokenizer gives them."""
    model = save_pair_model(tmp_path / "model", "GPT2", "LMHeadModel", **GPT2)
    out = tmp_path / "onnx"
    assert main(["export", str(tmp_path / "model"), "--format", "onnx", "--out", str(out)]) == 0
    session, tokenizer = (
        session_of(out / "onnx" / "model.onnx"),
        transformers.AutoTokenizer.from_pretrained(out),
    )
    given = tokenizer("the time", "people like to work", return_tensors="np")
    with torch.no_grad():
        expected = model(**tokenizer("the time", "people like to work", return_tensors="pt")).logits
    past = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]
    cache = [np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in past]
    found = []
    for start, stop in ((0, 5), (5, 6), (6, given["input_ids"].shape[1])):
        feed = {name: value[:, start:stop] for name, value in given.items()}
        feed |= {"attention_mask": given["attention_mask"][:, :stop]}
        logits, *cache = session.run(
            None, feed | {each.name: value for each, value in zip(past, cache, strict=True)}
        )
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected.numpy(), atol=1e-5)


def test_what_the_exporter_cannot_do_is_one_line(
    checkpoint_of: CheckpointFactory, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("step 2 of 3\nfailed") from ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    model = str(checkpoint_of("bert"))
    capsys.readouterr()
    assert main(["export", model, "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 2
    said = "ffsplit: BertModel could not be exported to ONNX: no such operator\n"
    assert capsys.readouterr().err.endswith(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_decoder_that_takes_no_positions(tmp_path: Path) -> None:
    """Bloom goes by the mask alone."""
    directory = save_family(tmp_path / "model", "bloom", "ForCausalLM")
    assert main(["export", str(directory), "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    for found, expected in generated(
        tmp_path / "onnx" / "onnx" / "model.onnx", directory, "BloomForCausalLM"
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("family", "head"), [("vit", "Model"), ("llava", "ForConditionalGeneration")])
def test_models_that_read_more_than_text_are_refused(
    tmp_path: Path, capsys: Any, family: str, head: str
) -> None:
    """Also those that may read text alone: their other towers would be lost."""
    save_family(tmp_path / "model", family, head)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "model"), "--format", "onnx", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "for models that read only text; this one reads pixel_values" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_sentence_transformers_stays_one(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    """Its modules, their weights and the length of texts; the graph is where its own loader looks."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.backend.utils import backend_should_export

    source, out = tmp_path / "model", tmp_path / "onnx"
    model = save_pair_model(source, "Bert", "Model")
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    for _, path in kinds[1:]:
        (source / path).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    dense = {"in_features": 32, "out_features": 8, "bias": False}
    dense |= {"activation_function": "torch.nn.modules.linear.Identity"}
    (source / "2_Dense" / "config.json").write_text(json.dumps(dense))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, source / "2_Dense" / "model.safetensors")
    assert main(["export", str(source), "--format", "onnx", "--out", str(out)]) == 0
    kept = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    kept -= {Path("model.safetensors")}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == kept | {
        Path("onnx/model.onnx")
    }
    found = backend_should_export(out, True, {}, "model.onnx", "*.onnx", "ONNX")
    assert found == (False, {"subfolder": "onnx", "file_name": "model.onnx"})
    loaded = sentence_transformers.SentenceTransformer(str(source), device="cpu")
    assert loaded.max_seq_length == 6
    texts = ["the time of day is now and then", "people"]
    expected = loaded.encode(texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    feed = dict(tokenizer(texts, padding=True, truncation=True, max_length=6, return_tensors="np"))
    (states,) = session_of(out / "onnx" / "model.onnx").run(None, feed)
    mask = feed["attention_mask"][..., None]
    embeddings = ((states * mask).sum(1) / mask.sum(1)) @ weight.numpy().T
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert load_whole_model(source, "BertModel").config.hidden_size == model.config.hidden_size
