"""A module's own code tells how it keeps its experts and how it is called; what runs is what is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.families.tiny import model_types, tiny_model
from ffsplit.calibration.hooks import FFNObserver, Sampling
from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.models.experts import (
    as_pairs,
    by_position,
    expert_activations,
    expert_matrices,
    sent_to_modules,
    stack_of,
)
from ffsplit.models.family import FFNPaths, Stack
from ffsplit.models.ffns import ffns_of
from ffsplit.models.names import base_of
from ffsplit.runtime.modules import narrow_experts
from tests.tiny_models import random_rows

USUAL = Stack()
STACKS = {
    "qwen3_moe": ("mlp.experts", USUAL, False),
    "gpt_oss": ("mlp.experts", Stack(transposed=True, down_transposed=True), False),
    "nemotron_h": ("mixer.experts", Stack(up="up_proj"), False),
    "llama4_text": (
        "feed_forward.experts",
        Stack(transposed=True, down_transposed=True, call="repeated"),
        True,
    ),
    "dbrx": (
        "ffn.experts",
        Stack(up="mlp.v1", gate="mlp.w1", down="mlp.w2", down_transposed=True, flat=4),
        True,
    ),
    "jetmoe": ("mlp", Stack(up="input_linear.weight", down="output_linear.weight", call="grouped"), True),
    "step3p7": ("mlp.experts", USUAL, True),
    "muse_spark_text": ("mlp.experts", USUAL, True),
    "inkling_text": ("mlp.shared_experts", Stack(up="up_proj", gate="gate_proj", call="every"), True),
}
"""Of each type: the module in a block that has experts, how it keeps them, and whether only it runs them."""


def module_of(model_type: str) -> Any:
    model = tiny_model(model_type, model_types()[model_type])
    path = STACKS[model_type][0]
    found = [each for name, each in model.named_modules() if name.endswith(f".{path}") and stack_of(each)]
    return found[0]


@pytest.mark.parametrize("model_type", STACKS)
def test_a_module_tells_its_stack(model_type: str) -> None:
    module = module_of(model_type)
    before = {name: each.clone() for name, each in module.named_parameters()}
    found = stack_of(module)
    assert found is not None
    assert (found.stack, found.narrow_only) == STACKS[model_type][1:]
    assert found.stack.sides(module.get_parameter(found.stack.down).shape, is_down=True) == (
        found.num_experts,
        found.hidden_size,
        found.width,
    )
    assert all(torch.equal(each, before[name]) for name, each in module.named_parameters())


def test_a_module_that_computes_something_else_has_no_stack() -> None:
    class Mixed(nn.Module):
        """Its activation depends on all neurons of a token."""

        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 24, 32))
            self.down_proj = nn.Parameter(torch.randn(4, 32, 24))

        def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            up, down = self.up_proj[index[:, 0]], self.down_proj[index[:, 0]]
            hidden = torch.einsum("td,tnd->tn", states, up).softmax(-1)
            return torch.einsum("tn,tdn->td", hidden, down) * weights

    assert stack_of(Mixed()) is None


def arguments_of(stack: Stack, num_experts: int) -> tuple[Any, ...]:
    """Arguments for 6 tokens of 32 dimensions."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(6, 32, generator=generator)
    if stack.call == "repeated":
        chosen = torch.eye(num_experts)[torch.arange(6) % num_experts].T.reshape(-1, 1)
        return (x_TD.repeat(num_experts, 1) * chosen,)
    if stack.call == "every":
        return x_TD, torch.rand(6, num_experts, generator=generator)
    if stack.call == "grouped":
        return (x_TD[None],)
    index = torch.stack([torch.arange(6) % num_experts, (torch.arange(6) + 1) % num_experts], dim=1)
    return x_TD, index, torch.rand(6, 2, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("model_type", [each for each in STACKS if each not in ("gpt_oss",)])
def test_a_narrowed_stack_is_the_whole_one_without_some_neurons(model_type: str) -> None:
    module = module_of(model_type)
    found = stack_of(module)
    assert found is not None
    stack, kept = found.stack, torch.arange(0, found.width, 3)
    paths = FFNPaths(
        up="", gate="" if found.is_gated else None, down="", stack=stack, gate_half=found.gate_half
    )
    whole = [expert_matrices(module, paths, expert) for expert in range(found.num_experts)]
    others = torch.ones(found.width, dtype=torch.bool)
    others[kept] = False
    for each in whole:
        each.down[:, others] = 0
    arguments = arguments_of(stack, found.num_experts)
    expected = module(*arguments)
    narrow_experts(module, stack, len(kept))
    for expert, each in enumerate(whole):
        narrow = expert_matrices(module, paths, expert)
        narrow.up.copy_(each.up[kept])
        narrow.down.copy_(each.down[:, kept])
        if narrow.gate is not None and each.gate is not None:
            narrow.gate.copy_(each.gate[kept])
    torch.testing.assert_close(module(*arguments), expected)


@torch.no_grad()
def test_the_activations_of_an_expert_are_those_that_its_down_projection_reads() -> None:
    module = module_of("llama4_text")
    found = stack_of(module)
    assert found is not None
    paths = FFNPaths(up="", gate="", down="", stack=found.stack, function=found.function)
    arguments = arguments_of(found.stack, found.num_experts)
    pairs = as_pairs(found.stack, by_position(found.stack, found.num_experts, arguments), found.num_experts)
    assert pairs.experts.flatten().tolist() == [0, 1, 2, 3, 0, 1]
    outputs = module(*arguments).view(found.num_experts, 6, 32)
    for row, (expert,) in enumerate(pairs.experts.tolist()):
        a_TN = expert_activations(module, paths, expert, pairs.states[row : row + 1], default="relu")
        down = expert_matrices(module, paths, expert).down
        torch.testing.assert_close((a_TN @ down.T)[0], outputs[expert, row])


@torch.no_grad()
def test_a_runners_own_code_tells_which_expert_modules_see_a_row() -> None:
    model = tiny_model("switch_transformers", model_types()["switch_transformers"])
    runner = next(each for name, each in model.named_modules() if name.endswith("mlp.experts"))
    experts, states = list(runner.children()), torch.randn(5, 32)
    chosen = torch.tensor([2, 0, 2, 3, 1])
    one_hot = torch.nn.functional.one_hot(chosen, len(experts))[:, None]
    one_hot[4] = 0  # beyond the capacity of its expert
    expected = runner(states, one_hot, torch.ones(5, 1))
    found = sent_to_modules(runner, experts, (states, one_hot, torch.ones(5, 1)))
    assert [set(row) - {-1} for row in found.experts.tolist()] == [{2}, {0}, {2}, {3}, set()]
    assert all("forward" not in vars(each) for each in experts)
    assert torch.equal(runner(states, one_hot, torch.ones(5, 1)), expected)


ROWS = random_rows(7)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama4_text", "dbrx", "muse_spark_text"])
def test_experts_are_counted_without_padding(model_type: str) -> None:
    """A batch with padding gives what its rows give one by one."""
    model = tiny_model(model_type, model_types()[model_type]).float()
    base = base_of(model)
    num_tokens = sum(map(len, ROWS))

    def statistics(batch_tokens: int) -> Any:
        sampling = Sampling(lambda _: torch.arange(4), {"attention_mask": num_tokens})
        with FFNObserver(base, ffns_of(model)[1], sampling=sampling) as observer:
            for batch in padded_batches(ROWS, batch_tokens=batch_tokens, pad_id=0):
                observer.next_batch(batch.arguments)
                base(**batch.arguments)
        return observer.statistics()

    together, alone = statistics(1000), statistics(1)
    assert sum(each.num_tokens for each in together) % num_tokens == 0
    for one, other in zip(together, alone, strict=True):
        assert one.num_tokens == other.num_tokens
        torch.testing.assert_close(
            torch.tensor(one.sum_abs), torch.tensor(other.sum_abs), rtol=1e-4, atol=1e-4
        )
