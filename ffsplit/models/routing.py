"""How a mixture chooses its experts: measured on the model, built without weights and with more experts.

No names are known beforehand. The config's field is the one that changes the number of all experts. The
router's tensors are those that get a row with each expert. Running a block's mixture shows how many experts
a token is sent to, and with which numbers of experts it works: groups must have equally many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffsplit.errors import UnsupportedModelError, explained
from ffsplit.ffn.shapes import LayerLayout, Mixture
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.detection import empty_builder
from ffsplit.models.family import Stack
from ffsplit.models.ffns import FFNPlace
from ffsplit.models.load_options import attention_advice
from ffsplit.models.names import base_of
from ffsplit.models.width_fields import config_at

NOT_BY_TOKEN = "its experts are not run by one module that also chooses them, for each token by itself"
STACKED = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
"""The usual names of the tensors that hold all experts of a block."""
FEWEST_IN_GROUP = 2
"""Routers score a group of experts by its best two."""


@dataclass(frozen=True)
class Routing:
    """A checkpoint's mixture, and what goes with an expert that is dropped.

    `fields` are the names under which the config's `part` may state the number of experts: the first is
    always written, the others only where they are present. `routers` maps stored tensors with a row per
    expert to the index of their block's first expert.
    """

    mixture: Mixture
    part: str | None
    fields: tuple[str, ...]
    routers: Mapping[str, int]

    def kept_rows(self, layouts: Sequence[LayerLayout]) -> dict[str, list[int]]:
        """The rows of each router's tensors that stay, by stored name."""
        number = self.mixture.num_experts
        return {
            name: [row for row in range(number) if not layouts[first + row].is_dropped]
            for name, first in self.routers.items()
        }


class _Probed(NamedTuple):
    """What building and running the model showed. Names are below the base model."""

    fields: tuple[str, ...]
    per_expert: frozenset[str]
    num_chosen: int
    num_groups: int


def routing_of(checkpoint: Checkpoint) -> Routing:
    """Measure how a checkpoint's mixture is routed. Reads no weights.

    Raises UnsupportedModelError if experts cannot be dropped without changing what the others do.
    """
    firsts = [ffn for ffn in checkpoint.ffns if ffn.expert == 0]
    family = checkpoint.architecture.model_type
    _check_whole(checkpoint, firsts)
    (part,) = {ffn.tower.config for ffn in firsts}
    number = sum(ffn.unit == firsts[0].unit for ffn in checkpoint.ffns)
    text = json.dumps(checkpoint.config, sort_keys=True)
    stacks = tuple(ffn.split_path for ffn in firsts)
    probed = _probe(checkpoint.directory, text, part, stacks, number)
    routers: dict[str, int] = {}
    for ffn in firsts:
        for name in sorted(each for each in probed.per_expert if each.startswith(f"{ffn.block}.")):
            stored = checkpoint.in_base(name)
            info = checkpoint.tensors.get(stored)
            if info is None or expert_shape(info.shape)[:1] != (number,):
                raise _refused(family, f"its files do not hold {name} with a row per expert")
            routers[stored] = ffn.index
    if len(routers) != len(probed.per_expert):
        raise _refused(family, "tensors outside the blocks of its experts have a row per expert")
    in_group = probed.num_chosen if probed.num_groups == 1 else max(FEWEST_IN_GROUP, probed.num_chosen)
    mixture = Mixture(
        num_experts=number,
        fewest=min(number, probed.num_groups * in_group),
        num_groups=probed.num_groups,
        firsts=tuple(ffn.index for ffn in firsts),
        router_elements=sum(checkpoint.tensors[name].num_elements for name in routers) // number,
    )
    return Routing(mixture, part, probed.fields, routers)


def _check_whole(checkpoint: Checkpoint, firsts: Sequence[FFNPlace]) -> None:
    """Raise UnsupportedModelError unless all blocks with experts have one mixture, of one size, in full."""
    family = checkpoint.architecture.model_type
    if any(ffn.expert is not None for ffn in checkpoint.left_out):
        raise _refused(
            family,
            "config.json states one number of experts for all blocks, and some experts are left out: "
            "give no --only or --skip that leaves out experts, and calibration data that reaches all",
        )
    stacks = [first.paths.stack for first in firsts]
    if any(stack is None or stack.call != "routed" for stack in stacks):
        raise _refused(family, NOT_BY_TOKEN)
    if not all(stack and _has_rows(stack) for stack in stacks):
        raise _refused(family, "its experts lie in tensors of an unusual form")
    counts = {first.unit: sum(ffn.unit == first.unit for ffn in checkpoint.ffns) for first in firsts}
    if len(set(counts.values())) != 1 or len({ffn.tower.config for ffn in firsts}) != 1:
        raise _refused(family, "its blocks have different numbers of experts")
    if len({ffn.block for ffn in firsts}) != len(firsts):
        raise _refused(family, "a block has several groups of experts, each with a router of its own")


def _has_rows(stack: Stack) -> bool:
    """Whether experts lie in the usual tensors, a row for each."""
    return stack.flat is None and stack.gate is None and {stack.up, stack.down} <= set(STACKED)


@lru_cache(maxsize=8)
def _probe(directory: Path, text: str, part: str | None, stacks: tuple[str, ...], number: int) -> _Probed:
    """Build the model with more experts, and run the mixture of its first block with experts."""
    config = json.loads(text)
    family = str(config.get("model_type"))
    with explained(
        f"{directory}: how this {family} routes tokens to its experts cannot be inspected",
        kind=UnsupportedModelError,
        advice=attention_advice(config),
    ):
        made, build = empty_builder(directory, config)
        model = build(made)

    def with_experts(field: str, count: int) -> Any:
        changed = type(made).from_dict(made.to_dict())
        setattr(config_at(changed, part), field, count)
        return build(changed)

    before = _shapes(model)
    owner = config_at(made, part)
    for field in [name for name, value in vars(owner).items() if type(value) is int and value == number]:
        try:
            per_expert = _per_expert(before, _shapes(with_experts(field, 2 * number)), stacks, number)
        except Exception:  # the family's code does not take this value
            continue
        if per_expert is not None:
            break
    else:
        raise _refused(
            family, f"no field of its config states the number of experts, {number}, and nothing else"
        )
    if not per_expert:
        raise _refused(family, "no tensor of its router has a row per expert")
    if _looks_up(model, stacks, per_expert):
        raise _refused(family, "its router has a table of integers, which may hold the numbers of experts")
    chosen = [_num_chosen(model, stack, per_expert) for stack in stacks]
    if None in chosen:
        raise _refused(family, NOT_BY_TOKEN)
    num_groups = _num_groups(lambda count: with_experts(field, count), stacks[0], per_expert, number)
    aliases = getattr(type(owner), "attribute_map", None) or {}
    fields = (field, *sorted(alias for alias, name in aliases.items() if name == field))
    return _Probed(fields, per_expert, max(each for each in chosen if each is not None), num_groups)


def _refused(family: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"whole experts of this {family} cannot be dropped: {reason}; use fast or norm-prune, which make "
        "experts narrower"
    )


def expert_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape from its first dimension of more than 1 on: experts may be the columns of a single row."""
    sizes = tuple(shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes


def _shapes(model: Any) -> dict[str, torch.Size]:
    """The shapes of everything that a model's files hold, by name; below the base model where it is."""
    base = base_of(model)
    start = "" if base is model else f"{model.base_model_prefix}."
    return {name.removeprefix(start): tensor.shape for name, tensor in model.state_dict().items()}


def _per_expert(
    before: Mapping[str, torch.Size],
    after: Mapping[str, torch.Size],
    stacks: Sequence[str],
    number: int,
) -> frozenset[str] | None:
    """The tensors, besides the stacks of experts, that have twice as many rows with twice the experts.

    None if the stacks have not, or if anything else changed.
    """
    if before.keys() != after.keys():
        return None
    changed = {name for name in before if before[name] != after[name]}
    pairs = {name: (expert_shape(before[name]), expert_shape(after[name])) for name in changed}
    doubled = {
        name for name, (old, new) in pairs.items() if old[:1] == (number,) and new == (2 * number, *old[1:])
    }
    own = {f"{stack}.{name}" for stack in stacks for name in STACKED} & before.keys()
    return frozenset(changed - own) if changed == doubled and own <= changed else None


class _Recorder(nn.Module):
    """Stands for a block's experts, and keeps what the router sends them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Any, ...] = ()

    def forward(self, states_TD: Tensor, *routed: Any, **more: Any) -> Tensor:
        self.seen = routed
        return torch.zeros_like(states_TD)


def _around(stack: str, per_expert: frozenset[str]) -> str:
    """The path of the smallest module that has a stack of experts and a tensor of its router."""
    path = stack.rpartition(".")[0]
    while path and not any(name.startswith(f"{path}.") for name in per_expert):
        path = path.rpartition(".")[0]
    return path


def _looks_up(model: Any, stacks: Sequence[str], per_expert: frozenset[str]) -> bool:
    """Whether a mixture has integers, which may send certain tokens to certain experts."""
    mixtures = [base_of(model).get_submodule(_around(stack, per_expert)) for stack in stacks]
    tensors = [tensor for each in mixtures for tensor in (*each.parameters(), *each.buffers())]
    return any(not tensor.is_floating_point() for tensor in tensors)


def _num_chosen(model: Any, stack: str, per_expert: frozenset[str]) -> int | None:
    """The number of experts that a token is sent to; None if the mixture does not tell.

    Runs the smallest module that has the experts and their router, on no device, and takes the experts out
    of the model.
    """
    path, recorder = _around(stack, per_expert), _Recorder()
    mixture = base_of(model).get_submodule(path)
    state = (*mixture.named_parameters(), *mixture.named_buffers())
    routers = [tensor for name, tensor in state if f"{path}.{name}" in per_expert and tensor.dim() == 2]
    mixture.set_submodule(stack.removeprefix(f"{path}."), recorder)
    try:
        columns, dtype = routers[0].shape[1], routers[0].dtype
        with torch.no_grad():
            mixture.eval()(torch.empty(1, 5, columns, device="meta", dtype=dtype))
    except Exception:  # a family's own code, which needs other arguments
        return None
    index, weights, *_ = (*recorder.seen, None, None)
    if not isinstance(index, Tensor) or not isinstance(weights, Tensor) or index.is_floating_point():
        return None
    return int(index.shape[1]) if index.shape == weights.shape and index.dim() == 2 else None


def _num_groups(build: Callable[[int], Any], stack: str, per_expert: frozenset[str], number: int) -> int:
    """The number of groups that the router divides experts into: the smallest number that can be added."""
    for added in (count for count in range(1, number) if number % count == 0):
        try:
            if _num_chosen(build(number + added), stack, per_expert) is not None:
                return added
        except Exception:  # the family's code does not take this number of experts
            continue
    return number
