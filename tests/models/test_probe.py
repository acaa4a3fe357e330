"""A module's own code tells its activation, and which of its matrices is the gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.moonshine import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineDecoderMLP

from ffsplit.compat.transformers import stacked_experts
from ffsplit.ffn.activations import ACTIVATIONS, clamped_name, softcapped_name
from ffsplit.models.probe import Gating, function_between, gating_of, gating_of_experts

Rule = Callable[[Tensor, Tensor], Tensor]


class Two(nn.Module):
    """down(rule(first x, second x))"""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
        self.rule, self.limit = rule, 7.0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.rule(self.first(x), self.second(x)))
        return found


class Fused(nn.Module):
    """down(rule(x W))"""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.both, self.down, self.rule = nn.Linear(16, 80), nn.Linear(40, 16), rule

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.rule(self.both(x)))
        return found


def of_two(rule: Rule) -> Gating | None:
    return gating_of(Two(rule), ups=("first", "second"), down="down", fused=False)


def of_fused(rule: Callable[[Tensor], Tensor]) -> Gating | None:
    return gating_of(Fused(rule), ups=("both",), down="down", fused=True)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_told_from_every_other(name: str) -> None:
    """Two kinds of GELU differ by 5e-4 at most."""
    found = of_two(lambda first, second: ACTIVATIONS[name](second) * first)
    assert found is not None and ACTIVATIONS[found.function] is ACTIVATIONS[name]
    assert found.gate == "second"


def test_the_half_of_the_gate_is_told() -> None:
    silu = ACTIVATIONS["silu"]

    def second_half(both: Tensor) -> Tensor:
        up, gate = both.chunk(2, dim=-1)
        return silu(gate) * up

    def by_turns(both: Tensor) -> Tensor:
        return silu(both[..., ::2]) * both[..., 1::2]

    assert of_fused(second_half) == Gating("silu", gate_half=1)
    assert of_fused(by_turns) == Gating("silu", gate_half=0, interleaved=True)


def test_a_clamp_is_told_by_a_number_of_the_module() -> None:
    def clamped(gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS["silu"](gate.clamp(max=7)) * (up.clamp(-7, 7) + 1)

    assert of_two(clamped) == Gating(clamped_name("silu", limit=7, shift=1), gate="first")

    def clamped_after(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate).clamp(max=7) * up.clamp(-7, 7)

    name = clamped_name("silu", limit=7, shift=0, is_after=True)
    assert of_two(clamped_after) == Gating(name, gate="first")


class Scaled(nn.Module):
    """RWKV's: another map of the inputs scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scale(x)) * self.down(torch.relu(self.up(x)).square())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_function_between_two_maps_is_told(device: str) -> None:
    with torch.device(device):
        module = Scaled()
    assert function_between(module, up="up", down="down") == "relu2"
    assert module.up.weight.shape == (40, 16) and module.up.weight.device.type == device


class Residual(nn.Module):
    """x + down(relu(up x)), as RF-DETR's decoder has it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_a_module_that_adds_its_input_is_told() -> None:
    """No split FFN may take its place: it would lose the sum."""
    found = gating_of(Residual(), ups=("up",), down="down", fused=False)
    assert found == Gating("relu", adds_input=True)


def test_soft_caps_are_told_by_numbers_of_the_module() -> None:
    def softcapped(gate: Tensor, up: Tensor) -> Tensor:
        return 9.5 * (gate / 9.5).tanh() * gate.sigmoid() * 4.5 * (up / 4.5).tanh()

    module = Two(softcapped)
    module.cap, module.other = 4.5, 9.5  # type: ignore[assignment]
    found = gating_of(module, ups=("first", "second"), down="down", fused=False)
    assert found == Gating(softcapped_name(9.5, 4.5), gate="first")


def test_what_no_form_gives_is_none() -> None:
    assert of_two(lambda first, second: first * second.softmax(-1)) is None
    assert of_two(lambda first, second: first[..., :3]) is None, "it raises"


def test_a_device_without_data_is_no_hindrance() -> None:
    """Models are built on the meta device when a compressed checkpoint is loaded."""
    with torch.device("meta"):
        module = Two(lambda first, second: ACTIVATIONS["gelu"](first) * second)
        found = gating_of(module, ups=("first", "second"), down="down", fused=False)
    assert found == Gating("gelu", gate="first")
    assert module.first.weight.is_meta and module.first.weight.shape == (40, 16), "it is as it was"


def test_modules_of_transformers() -> None:
    config = MoonshineConfig(hidden_size=16, intermediate_size=40)
    module = MoonshineDecoderMLP(config, "silu")
    found = gating_of(module, ups=("fc1",), down="fc2", fused=True)
    assert found == Gating("silu", gate_half=1)
    experts = GptOssExperts(GptOssConfig(hidden_size=16, intermediate_size=32, num_local_experts=2))
    form = stacked_experts(experts)
    assert form is not None and form.is_interleaved and form.is_transposed
    assert gating_of_experts(experts, form) == "quick_gelu, clamped at 7, up + 1"
