"""A server calls one model from many threads: they get what one thread gets, and matrices are packed once."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffsplit.runtime.kernels import int4 as int4_kernels
from ffsplit.runtime.kernels import int8 as int8_kernels
from ffsplit.runtime.quantized_linear import QuantizedLinear, share_inputs
from tests.runtime.test_quantized_linear import inputs, made
from tests.runtime.test_split_ffn import made as made_ffn

NUM_THREADS, ROUNDS = 8, 40


@pytest.fixture(autouse=True)
def threads_that_change_places_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(call: Callable[[int], Any]) -> list[Any]:
    """What `call` gives in each of eight threads that start together; what one raises is raised here."""
    barrier, answers = threading.Barrier(NUM_THREADS), [None] * NUM_THREADS
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait(60)
            with torch.no_grad():
                answers[number] = call(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return answers


class Attention(nn.Module):
    """Queries, keys and values of one input, and what comes after them."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(made(8, 64, 64, seed=seed, bias=False) for seed in range(4))
        share_inputs(self.linears)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (each(x) for each in self.linears[:3])
        output: Tensor = self.linears[3](queries * keys + values)
        return output


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention in int8": Attention,
    "int8": lambda: made_ffn("int8", gated=False),
    "int8 and int4": lambda: made_ffn("int8 and int4", gated=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_eight_threads_get_what_one_gets(name: str) -> None:
    """The first calls pack; every thread has inputs of its own."""
    model = MODELS[name]()
    width = 64 if name.startswith("attention") else 32
    given = [inputs(5, width, seed=seed) for seed in range(NUM_THREADS)]
    with torch.no_grad():
        expected = [copy.deepcopy(model)(x) for x in given]
    for _ in range(ROUNDS):
        fresh = copy.deepcopy(model)
        answers = at_once(lambda number, fresh=fresh: [fresh(given[number]) for _ in range(3)])
        for found, alone in zip(answers, expected, strict=True):
            assert all(torch.equal(each, alone) for each in found)
        if isinstance(fresh, Attention):
            products: Any = [each._packed for each in fresh.linears[:3]]
            assert products[0].product is products[1].product is products[2].product


def test_threads_that_share_one_input_get_products_of_their_own() -> None:
    """Whoever is given a product may change it in place."""
    model, x = Attention(), inputs(5, 64)
    with torch.no_grad():
        expected = [each(x).clone() for each in copy.deepcopy(model).linears[:3]]

    def products(_: int) -> list[Tensor]:
        found = []
        for each in model.linears[:3]:
            y = each(x)
            found.append(y.clone())
            y.zero_()
        return found

    for _ in range(ROUNDS):
        for found in at_once(products):
            assert all(torch.equal(mine, alone) for mine, alone in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_bits", [8, 4])
def test_a_matrix_is_packed_once(num_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever packs waits for a second thread to come to the same place, which none does."""
    kernels: Any = int8_kernels if num_bits == 8 else int4_kernels
    pack, meeting, packed = kernels.pack, threading.Barrier(2), []

    def slowly(*given: Any, **options: Any) -> Any:
        packed.append(threading.get_ident())
        try:
            meeting.wait(0.2)
        except threading.BrokenBarrierError:
            meeting.reset()
        return pack(*given, **options)

    monkeypatch.setattr(kernels, "pack", slowly)
    linear = made(num_bits, 48, 64, group_size=None if num_bits == 8 else 32)
    with torch.no_grad():
        expected = copy.deepcopy(linear)(inputs(3, 64))
    packed.clear()
    answers = at_once(lambda _: linear(inputs(3, 64)))
    assert len(packed) == 1 and all(torch.equal(found, expected) for found in answers)


def test_what_is_saved_while_others_call_is_whole() -> None:
    """Saving and copying unpack what calls pack; so does a call that wants gradients."""
    x = inputs(3, 64)
    model = nn.Sequential(made(8, 64, 64, bias=False), made(4, 64, 64, group_size=32, seed=1))
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)

    def call(number: int) -> None:
        for _ in range(ROUNDS):
            if number == 0:
                saved = model.state_dict()
                assert saved.keys() == stored.keys()
                assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())
            elif number == 1:
                twin = copy.deepcopy(model)
                assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in stored.items())
            elif number == 2:
                with torch.enable_grad():
                    model(x.clone().requires_grad_()).sum().backward()
            else:
                assert torch.equal(model(x), expected)

    at_once(call)


@torch.no_grad()
def test_a_module_with_a_lock_is_copied_and_pickled() -> None:
    model, x = Attention(), inputs(3, 64)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        first: Any = twin.linears[0]
        assert isinstance(first, QuantizedLinear) and first.inputs is twin.linears[3].inputs
        assert first.inputs is not model.linears[0].inputs
        assert torch.equal(twin(x), expected)
