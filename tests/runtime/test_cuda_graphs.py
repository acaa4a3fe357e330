"""Replayed forward passes give what the model gives; on the CPU, and with gradients, they are its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ffsplit
from ffsplit.errors import ConfigError, UnsupportedModelError
from ffsplit.runtime.cuda_graphs import ReplayedForward, use_cuda_graphs
from tests.conftest import CheckpointFactory
from tests.small_jobs import SmallJob

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def encoder() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return transformers.BertModel(transformers.BertConfig(vocab_size=100, **sizes)).eval()


def batch(rows: int, tokens: int, *, padded: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, tokens - padded :] = 0
    ids = torch.randint(1, 100, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": mask}


def test_a_model_on_the_cpu_is_refused(tmp_path: Path, checkpoint_of: CheckpointFactory) -> None:
    with pytest.raises(ConfigError, match="need a model on a GPU"):
        use_cuda_graphs(encoder())
    job = SmallJob(tmp_path, checkpoint_of("bert"))
    ffsplit.compress(job.config(tmp_path / "out", recipe=job.recipe(step="{kind: prune}")))
    with pytest.raises(ConfigError, match="need a model on a GPU"):
        ffsplit.load(tmp_path / "out", cuda_graphs=True)


def test_inputs_on_the_cpu_take_the_models_own_method() -> None:
    model, given = encoder(), batch(2, 8, padded=3)
    forward = ReplayedForward(model, 2)
    with torch.no_grad():
        expected, found = model(**given), forward(given["input_ids"], attention_mask=given["attention_mask"])
    assert type(found) is type(expected)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_a_copy_of_a_model_has_a_forward_method_of_its_own() -> None:
    model, given = encoder(), batch(2, 8)
    model.forward = ReplayedForward(model, 2)
    copied = copy.deepcopy(model)
    copied.embeddings.word_embeddings.weight.data.zero_()
    assert copied.forward is not model.forward
    with torch.no_grad():
        assert not torch.equal(copied(**given).last_hidden_state, model(**given).last_hidden_state)


class TestOnAGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("padded", [0, 3])
    def test_outputs_are_those_of_the_model(self, padded: int) -> None:
        model = encoder().cuda()
        replayed = use_cuda_graphs(copy.deepcopy(model))
        for rows in (2, 3, 2):  # the last replays the first one's graph, with other inputs
            given = {name: tensor.cuda() for name, tensor in batch(rows, 8, padded=padded).items()}
            given["input_ids"] += rows
            with torch.no_grad():
                expected, found = model(**given), replayed(**given)
            torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
            torch.testing.assert_close(found.pooler_output, expected.pooler_output)
        assert len(replayed.forward._captures) == 2

    def test_an_earlier_output_is_not_overwritten(self) -> None:
        replayed = use_cuda_graphs(encoder().cuda())
        ids = batch(2, 8)["input_ids"].cuda()
        with torch.inference_mode():
            first = replayed(input_ids=ids).last_hidden_state
            before = first.clone()
            replayed(input_ids=ids + 1)
        assert torch.equal(first, before)

    def test_moved_weights_are_captured_again(self) -> None:
        model = encoder().cuda()
        replayed, ids = use_cuda_graphs(copy.deepcopy(model)), batch(2, 8)["input_ids"].cuda()
        with torch.no_grad():
            replayed(input_ids=ids)
            found = replayed.cpu().double().cuda()(input_ids=ids).last_hidden_state
            expected = model.double()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, expected)

    def test_the_shapes_last_used_are_kept(self) -> None:
        replayed = use_cuda_graphs(encoder().cuda(), most=2)
        with torch.no_grad():
            for tokens in (4, 5, 4, 6):
                replayed(input_ids=batch(2, tokens)["input_ids"].cuda())
        kept = [key[0][0][1][1] for key in replayed.forward._captures]
        assert kept == [4, 6]

    def test_gradients_take_the_models_own_method(self) -> None:
        replayed = use_cuda_graphs(encoder().cuda())
        replayed(input_ids=batch(2, 8)["input_ids"].cuda()).last_hidden_state.sum().backward()
        assert replayed.embeddings.word_embeddings.weight.grad is not None
        assert not replayed.forward._captures

    def test_a_cache_among_the_outputs_is_refused(self) -> None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.LlamaConfig(vocab_size=100, **sizes)
        replayed = use_cuda_graphs(transformers.LlamaForCausalLM(config).eval().cuda())
        ids = batch(2, 8)["input_ids"].cuda()
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="pass use_cache=False"):
            replayed(input_ids=ids)
        with torch.no_grad():
            assert replayed(input_ids=ids, use_cache=False).logits.shape == (2, 8, 100)
