"""The table's functions are the ones that transformers gives the same names."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from ffsplit.errors import UnsupportedModelError
from ffsplit.ffn.activations import ACTIVATIONS, TRAINED, activation_named, check_activation


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_transformers(name: str) -> None:
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    torch.testing.assert_close(activation_named(name)(x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)
    x = x.float()
    torch.testing.assert_close(activation_named(name)(x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_input_is_left_as_it_was(name: str) -> None:
    x = torch.linspace(-2, 2, 50)
    activation_named(name)(x)
    assert torch.equal(x, torch.linspace(-2, 2, 50))


def test_an_unknown_activation_lists_the_known_ones() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'made-up' is not supported \(known: gelu, .*swish, tanh, xielu\)"
    ):
        activation_named("made-up")


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_one_equals_transformers(name: str) -> None:
    """With parameters that are not those it begins with."""
    module = ACT2FN[name].double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.fill_(0.3 + number)
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    found = activation_named(name, module.state_dict())(x)
    torch.testing.assert_close(found, module(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(activation_named(name, dict(module.named_parameters()))(x), found)


def test_a_trained_one_without_its_parameters_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'xielu': the model has no tensor alpha_n"):
        check_activation("xielu", ["alpha_p", "beta"])
