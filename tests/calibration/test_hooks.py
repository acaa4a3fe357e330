"""What the hooks sum is what every FFN saw, token by token, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ffsplit.calibration.hooks import FFNObserver, Sampling
from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.calibration.statistics import NeuronStats
from ffsplit.errors import CalibrationError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.ffns import ffns_of
from ffsplit.models.load import load_base_model
from tests.tiny_families import make_model as make_family
from tests.tiny_models import FAMILIES, NUM_LAYERS, make_model, random_rows, save_checkpoint

BERT_PATHS = ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense")
LLAMA_PATHS = ("layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj")
UP_AND_DOWN = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), BERT_PATHS),
    "distilbert": ("transformer.layer.{}.ffn.lin1", "transformer.layer.{}.ffn.lin2"),
    "opt": ("decoder.layers.{}.fc1", "decoder.layers.{}.fc2"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_PATHS),
}
ROWS = random_rows(9)
NUM_TOKENS = sum(map(len, ROWS))
NO_SAMPLE = torch.empty(0, dtype=torch.long)


def in_batch_order(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(row) for row in sorted(rows, key=len, reverse=True)]


@torch.no_grad()
def observe(
    model: Any, family: str, *, batch_tokens: int, sampled: Tensor = NO_SAMPLE
) -> tuple[tuple[NeuronStats, ...], Sequence[Tensor]]:
    sampling = Sampling(lambda _: sampled, {"attention_mask": NUM_TOKENS})
    with FFNObserver(model, ffns_of(model)[1], sampling=sampling) as observer:
        for batch in padded_batches(ROWS, batch_tokens=batch_tokens, pad_id=0):
            observer.next_batch(batch.arguments)
            model(**batch.arguments)
    return observer.statistics(), [tensors["input"] for tensors in observer.inputs().values()]


def test_tokens_that_are_not_counted_are_taken_from_the_first_batch() -> None:
    """Rows with pictures are not tokenized twice: the first batch tells how many tokens all will have."""
    model = make_model("bert")
    totals: list[int] = []

    def choose(total: int) -> Tensor:
        totals.append(total)
        return torch.arange(0, total, 3)

    batches = list(padded_batches(ROWS, batch_tokens=64, pad_id=0))
    with FFNObserver(model, ffns_of(model)[1], sampling=Sampling(choose, {}, len(ROWS))) as observer:
        for batch in batches:
            observer.next_batch(batch.arguments)
            model(**batch.arguments)
    first = batches[0]
    assert totals == [-(-first.num_tokens * len(ROWS) // first.num_rows)]
    inputs = observer.inputs()[0]["input"]
    assert len(inputs) == len(range(0, NUM_TOKENS, 3))


@torch.no_grad()
def watched_alone(model: Any, family: str, layer: int) -> tuple[Tensor, Tensor]:
    """FFN inputs [T, D] and activations [T, N] of one layer, each row run by itself without padding."""
    seen: dict[str, list[Tensor]] = {"up": [], "down": []}
    up, down = (model.get_submodule(path.format(layer)) for path in UP_AND_DOWN[family])
    handles = [
        up.register_forward_hook(lambda _, args, __: seen["up"].append(args[0].flatten(0, -2))),
        down.register_forward_hook(lambda _, args, __: seen["down"].append(args[0].flatten(0, -2))),
    ]
    for row in in_batch_order(ROWS):
        model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return torch.cat(seen["up"]), torch.cat(seen["down"])


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_those_of_rows_run_alone(family: str) -> None:
    model = make_model(family)
    statistics, _ = observe(model, family, batch_tokens=60)
    assert len(statistics) == NUM_LAYERS
    for layer, stats in enumerate(statistics):
        a_TN = watched_alone(model, family, layer)[1].double().numpy()
        assert stats.num_tokens == len(a_TN) == NUM_TOKENS
        scale = np.abs(a_TN).sum(0)
        np.testing.assert_allclose(stats.sum_abs, scale, rtol=1e-5)
        assert np.all(np.abs(stats.sum - a_TN.sum(0)) <= 1e-5 * scale)
        np.testing.assert_allclose(stats.sum_squares, (a_TN**2).sum(0), rtol=2e-5)
        np.testing.assert_allclose(stats.max_abs, np.abs(a_TN).max(0), rtol=1e-5)
        assert stats.num_active.tolist() == (a_TN > 0).sum(0).tolist()
        down = model.get_submodule(UP_AND_DOWN[family][1].format(layer)).weight
        np.testing.assert_allclose(stats.down_norm, np.linalg.norm(down.detach().double(), axis=0))


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_padding_is_never_counted(family: str) -> None:
    model = make_model(family)
    alone, padded = (observe(model, family, batch_tokens=tokens)[0] for tokens in (1, 10_000))
    for first, second in zip(alone, padded, strict=True):
        assert first.num_tokens == second.num_tokens == NUM_TOKENS
        assert first.num_active.tolist() == second.num_active.tolist()
        np.testing.assert_allclose(first.sum_abs, second.sum_abs, rtol=1e-5)
        np.testing.assert_allclose(first.max_abs, second.max_abs, rtol=1e-5)
        np.testing.assert_array_equal(first.down_norm, second.down_norm)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_inputs_are_the_ffn_inputs_at_those_positions(family: str) -> None:
    model = make_model(family)
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(3))
    sampled = order[: NUM_TOKENS // 3].sort().values
    _, inputs = observe(model, family, batch_tokens=60, sampled=sampled)
    assert len(inputs) == NUM_LAYERS
    for layer, input_TD in enumerate(inputs):
        expected = watched_alone(model, family, layer)[0][sampled]
        torch.testing.assert_close(input_TD, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_nothing_sampled_nothing_kept(family: str) -> None:
    assert list(observe(make_family(family), family, batch_tokens=60)[1]) == []


def test_the_activations_follow_from_the_sampled_inputs() -> None:
    """Sampled inputs through the layer's own weights give the sums: both hooks saw the same tokens."""
    model = make_model("llama")
    statistics, inputs = observe(model, "llama", batch_tokens=60, sampled=torch.arange(NUM_TOKENS))
    for layer, (stats, x_TD) in enumerate(zip(statistics, inputs, strict=True)):
        mlp = model.layers[layer].mlp
        a_TN = (functional.silu(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)).detach().double()
        np.testing.assert_allclose(stats.sum_abs, a_TN.abs().sum(0), rtol=1e-5)


def test_hooks_are_gone_after_the_run_even_when_it_fails() -> None:
    model = make_model("bert")
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        FFNObserver(model, ffns_of(model)[1]),
    ):
        raise RuntimeError("out of memory")
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_an_ffn_that_bypasses_its_hooks_is_an_error() -> None:
    model = make_model("llama")
    mlp = model.layers[1].mlp

    def fused(x: Tensor) -> Tensor:
        gate = functional.silu(functional.linear(x, mlp.gate_proj.weight, mlp.gate_proj.bias))
        hidden = gate * functional.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)
        return functional.linear(hidden, mlp.down_proj.weight, mlp.down_proj.bias)

    mlp.forward = fused
    with pytest.raises(CalibrationError, match=rf"layer 1 saw 0 of {NUM_TOKENS} tokens"):
        observe(model, "llama", batch_tokens=60)


def test_an_ffn_that_sees_tokens_twice_is_an_error() -> None:
    model = make_model("bert")
    output = model.encoder.layer[2].output
    once = output.forward
    output.forward = lambda hidden, residual: (once(hidden, residual), once(hidden, residual))[0]
    with pytest.raises(CalibrationError, match=rf"layer 2 saw {2 * NUM_TOKENS} of {NUM_TOKENS} tokens"):
        observe(model, "bert", batch_tokens=60)


def test_an_ffn_run_in_chunks_is_counted_right(tmp_path: Path) -> None:
    """A config's `chunk_size_feed_forward` runs the FFN in pieces of a row, padding and all."""
    save_checkpoint(tmp_path, "bert", chunk_size_feed_forward=1)
    pieces = load_base_model(open_checkpoint(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    sampled = torch.arange(0, NUM_TOKENS, 2)
    expected, expected_inputs = observe(make_model("bert"), "bert", batch_tokens=60, sampled=sampled)
    found, inputs = observe(pieces, "bert", batch_tokens=60, sampled=sampled)
    for first, second in zip(expected, found, strict=True):
        np.testing.assert_allclose(first.sum_abs, second.sum_abs, rtol=1e-5)
    for first_TD, second_TD in zip(expected_inputs, inputs, strict=True):
        torch.testing.assert_close(first_TD, second_TD, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inputs_alone_are_the_same_inputs_and_batches_without_any_may_be_left_out() -> None:
    model, sampled = make_model("bert"), torch.tensor([0, 3, 60])
    _, expected = observe(model, "bert", batch_tokens=30, sampled=sampled)
    num_run = 0
    sampling = Sampling(lambda _: sampled, {"attention_mask": NUM_TOKENS})
    with FFNObserver(model, ffns_of(model)[1], sampling=sampling, inputs_only=True) as observer:
        for batch in padded_batches(ROWS, batch_tokens=30, pad_id=0):
            observer.next_batch(batch.arguments)
            if observer.batch_is_sampled:
                num_run += 1
                model(**batch.arguments)
    assert num_run == 2
    inputs = [tensors["input"] for tensors in observer.inputs().values()]
    assert all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True))


@torch.no_grad()
def test_experts_inputs_alone_come_without_statistics() -> None:
    model, sampled = make_family("mixtral"), torch.tensor([0, 3, 60])
    _, expected = observe(model, "mixtral", batch_tokens=30, sampled=sampled)
    sampling = Sampling(lambda _: sampled, {"attention_mask": NUM_TOKENS})
    with FFNObserver(model, ffns_of(model)[1], sampling=sampling, inputs_only=True) as observer:
        for batch in padded_batches(ROWS, batch_tokens=30, pad_id=0):
            observer.next_batch(batch.arguments)
            model(**batch.arguments)
    inputs = [tensors["input"] for tensors in observer.inputs().values()]
    assert len(inputs) == 2 and all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True))
    with pytest.raises(CalibrationError, match="layer 0 experts saw 0 of"):
        observer.statistics()


@torch.no_grad()
def test_a_tower_without_a_mask_is_sampled_once_over_all_batches() -> None:
    """A ViT of 2 x 2 patches and a class token sees 5 positions a picture."""
    model, asked = make_family("vit"), list[int]()
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def choose(num_tokens: int) -> Tensor:
        asked.append(num_tokens)
        return torch.tensor([1, 11, 29])

    found = []
    for size in (6, 2):
        with FFNObserver(model, ffns_of(model)[1], sampling=Sampling(choose, num_rows=6)) as observer:
            for rows in pixels.split(size):
                observer.next_batch({"pixel_values": rows})
                model(pixel_values=rows)
        assert [stats.num_tokens for stats in observer.statistics()] == [30, 30]
        found.append(torch.cat([tensors["input"] for tensors in observer.inputs().values()]))
    assert asked == [30, 30]
    torch.testing.assert_close(*found)


def test_activations_that_are_not_finite_are_an_error() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    with pytest.raises(CalibrationError, match=r"layer 1 has activations that are not finite.*--dtype"):
        observe(model, "llama", batch_tokens=60)
