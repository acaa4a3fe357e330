"""Finds the FFNs among a model's modules by their structure.

Every block of every list is searched for FFNs: two or three linear maps from one size to another and
back, or a stack of experts of that shape. Other things may have that shape (attention, mixers of positions,
routers, adapters, heads); their names and classes tell them apart. A map in a block that has an FFN's shape
and belongs to none is an error: the model would be compressed in part only.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ffsplit.compat.transformers import activation_of, is_conv1d
from ffsplit.errors import UnsupportedModelError
from ffsplit.models.experts import stack_of
from ffsplit.models.family import Stack

_NOT_FFN_CLASS = re.compile(
    r"(Attention(V?\d|\dD)?|Attn|SelfOutput|Mixer|Mamba\d?|MambaLayer|ShortConv|DeltaNet|RecurrentBlock"
    r"|Retention|LightConv1d|Conv(olution)?Module|Router|Gate|Adapter|Pooler|Projector|Merger|Connector|Norm)$"
)
NOT_FFN_PATH = re.compile(
    r"^(\w*attn|\w*attention|\w*_att|router|\w*adapters?(_\w+)?|pooler|lora\w*|\w*norm\w*|bottleneck|ple_block"
    r"|per_layer_\w+|laurel|downsample|\w*bbox\w*|\w*class_embed\w*|\w*_head|projection|queries|keys_values"
    r"|modulation|patch_(?!encoder$)\w+|\w*hyper_connection|pwconv\d|pointwise_conv\d|\w*merger\w*|\w*projectors?"
    r"|readout_projects|(pre|post)_expert_\w+)$"
)
_MIXES_POSITIONS = re.compile(
    r"(Attention(V?\d|\dD)?|Attn|Mixer|Mamba\d?|MambaLayer|ShortConv|DeltaNet|RecurrentBlock)$"
)
_FFN_WORDS = re.compile(r"mlp|ffn|feed_?forward|intermediate|fc1", re.I)
_GATES = re.compile(r"gate|wi_0|(^|\.)w1$|fc1_g")


class Modules(dict[str, nn.Module]):
    """The modules of a base model, by path."""

    @classmethod
    def of(cls, base: nn.Module) -> Modules:
        return cls(base.named_modules())

    @cached_property
    def around_mixers(self) -> frozenset[str]:
        """The paths of all modules that mix positions, and of all modules around them."""
        mixers = [path for path, module in self.items() if _MIXES_POSITIONS.search(type(module).__name__)]
        parts = [path.split(".") for path in mixers]
        return frozenset(".".join(each[:length]) for each in parts for length in range(1, len(each) + 1))


class _Map(NamedTuple):
    """A linear map of a model, below its base model."""

    path: str
    num_rows: int
    num_columns: int
    transposed: bool

    @property
    def words(self) -> frozenset[str]:
        return frozenset(re.split(r"[._]", self.path))


class FoundFFN(NamedTuple):
    """One FFN, or one block's stack of experts, by paths below the base model."""

    scope: str
    """The smallest module that has all of it."""
    up: str
    gate: str | None
    down: str
    width: int
    hidden_size: int
    fused: bool = False
    transposed: bool = False
    interleaved: bool = False
    experts: bool = False
    per_neuron: tuple[str, ...] = ()
    """Depthwise convolutions and batch norms between up projection and activation."""
    function: str | None = None
    """The activation, where the experts' module tells it."""
    stack: Stack | None = None
    """How the scope keeps experts."""
    gate_half: int = 0
    narrow_only: bool = False
    starred: str | None = None
    """For all experts of a block that are modules of their own: their path, with `*` for the number."""
    adapters: tuple[str, ...] = ()
    """Linear maps whose outputs are added to those of up, one at a time."""
    has_twins: bool = False
    """Whether other blocks run the same FFN."""
    num_ffns: int = 1
    is_alone: bool = True
    """Whether the scope has no other parameters, so that it may be replaced as a whole."""


def find_in_modules(modules: Modules) -> list[FoundFFN]:
    """All FFNs, in the order of the modules."""
    found = list(_stacks(modules))
    inside: dict[str, list[_Map]] = defaultdict(list)
    for each in _maps(modules):
        block, parts = block_of(each.path, modules), each.path.split(".")
        for length in range(len(parts) - 1, 0, -1):
            scope = ".".join(parts[:length])
            inside[scope].append(each)
            if scope == block:
                break
    taken: set[str] = set()
    for scope in sorted(inside, key=lambda path: -path.count(".")):  # the smallest modules first
        while group := _group([each for each in inside[scope] if each.path not in taken], scope, modules):
            up, gate, down, fused = group
            names = {each.path for each in (up, gate, down) if each is not None}
            taken |= names
            adapters = _adapters(scope, up, modules)
            owners = {name.rpartition(".")[0] for name, _ in modules[scope].named_parameters()}
            others = {
                f"{scope}.{owner}"
                for owner in owners
                if activation_of(modules[scope].get_submodule(owner)) is None
            } - names
            found.append(
                FoundFFN(
                    scope,
                    up.path,
                    gate.path if gate else None,
                    down.path,
                    down.num_columns,
                    down.num_rows,
                    fused=fused,
                    transposed=up.transposed,
                    per_neuron=() if gate or fused or up.transposed else _per_neuron(scope, down, modules),
                    adapters=adapters,
                    is_alone=not others,
                )
            )
    order = {path: index for index, path in enumerate(modules)}
    return sorted(found, key=lambda each: order[each.scope if each.experts else each.up])


def _per_neuron(scope: str, down: _Map, modules: Modules) -> tuple[str, ...]:
    """The modules of an FFN's scope that treat each of its neurons by itself. The trial proves it."""
    width = down.num_columns
    return tuple(
        path
        for path, module in modules.items()
        if path.startswith(f"{scope}.")
        and width != down.num_rows
        and (
            (
                isinstance(module, _ConvNd)
                and module.groups == module.in_channels == module.out_channels == width
            )
            or (isinstance(module, _BatchNorm) and module.num_features == width)
        )
    )


def check_nothing_is_left(modules: Modules, found: Sequence[FoundFFN], family: str) -> None:
    """Raise UnsupportedModelError if a block has a weight of an FFN's shape that is part of none found.

    That is a matrix, or a stack of matrices, that widens the hidden size or narrows to it.
    """
    hidden: dict[str, set[int]] = defaultdict(set)  # by block, and by list of blocks
    for ffn in found:
        block = block_of(ffn.up, modules) or ""
        hidden[block].add(ffn.hidden_size)
        hidden[_starred(block)].add(ffn.hidden_size)
    sizes = set().union(*hidden.values())
    taken = {path for each in found for path in (each.up, each.gate, each.down)}
    stacked = {
        f"{each.scope}.{name}"
        for each in found
        if each.stack is not None
        for name in (each.stack.up, each.stack.gate, each.stack.down)
    }
    left: dict[str, str] = {}
    for each in _maps(modules):
        narrow, wide = sorted((each.num_rows, each.num_columns))
        block = block_of(each.path, modules) or ""
        alike = hidden.get(block) or hidden.get(_starred(block)) or sizes
        if narrow in alike and wide > narrow and each.path not in taken:
            left[_starred(each.path)] = f"[{each.num_rows}, {each.num_columns}]"
    for path, module in modules.items():
        is_other = (
            isinstance(module, _ConvNd)
            or "parametrizations" in path
            or _NOT_FFN_CLASS.search(type(module).__name__)
            or any(NOT_FFN_PATH.search(part) for part in path.split("."))
        )
        if block_of(path, modules) is None or is_other:
            continue
        for name, weight in module.named_parameters(recurse=False):
            if f"{path}.{name}" in stacked:
                continue
            if weight.dim() == 3 and sizes & set(weight.shape[1:]) and min(weight.shape[1:]) > 1:
                left[_starred(f"{path}.{name}")] = str(list(weight.shape))
    for ffn in found:
        if "experts" in ffn.scope.split(".")[:-1] and not ffn.experts and _expert_of(ffn, modules) is None:
            left[_starred(ffn.down)] = f"[{ffn.hidden_size}, {ffn.width}]"
        between = [
            path
            for name, weight in modules[ffn.scope].named_parameters()
            if _is_norm_of(name, weight, ffn)
            and (path := f"{ffn.scope}.{name}".rpartition(".")[0]) not in ffn.per_neuron
        ]
        if between and not ffn.is_alone and not ffn.experts:
            raise UnsupportedModelError(
                f"{family} has a norm over its FFNs' neurons ({_starred(between[0])}), so the output of each "
                "depends on all others, and none can be dropped without changing the rest: FFSplit cannot "
                "compress it; quantize it with another tool"
            )
    if left:
        words = ", ".join(f"{name} {shape}" for name, shape in sorted(left.items())[:4])
        raise UnsupportedModelError(
            f"{family} is not in the table of architectures, and its blocks have weights that may belong to "
            f"an FFN, in a form that FFSplit does not know: {words}; it would be compressed in part only"
        )


def block_of(path: str, modules: Modules) -> str | None:
    """The block that a module lies in: an element of a list, with the attention beside it if there is one.

    None if no list has it. Where lists are nested, the innermost element that mixes positions is the block.
    """
    parts = path.split(".")
    elements = [
        ".".join(parts[: index + 1])
        for index, part in enumerate(parts[:-1])
        if part.isdigit() and isinstance(modules[".".join(parts[:index])], nn.ModuleList | nn.Sequential)
    ]
    mixing = [element for element in elements if element in modules.around_mixers]
    return mixing[-1] if mixing else elements[0] if elements else None


def _maps(modules: Modules) -> list[_Map]:
    """The linear maps that may belong to an FFN: those of blocks, outside attention and the like."""
    skipped: set[str] = set()
    found = []
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        is_other = NOT_FFN_PATH.search(name) or (
            not name.isdigit() and _NOT_FFN_CLASS.search(type(module).__name__)
        )
        if path and (parent in skipped or is_other):
            skipped.add(path)
        elif isinstance(module, nn.Linear) and block_of(path, modules) is not None:
            rows, columns = module.weight.shape
            found.append(_Map(path, rows, columns, transposed=False))
        elif is_conv1d(module) and block_of(path, modules) is not None:
            weight: Any = module.weight
            columns, rows = weight.shape
            found.append(_Map(path, rows, columns, transposed=True))
    return found


def _adapters(scope: str, up: _Map, modules: Modules) -> tuple[str, ...]:
    """The last maps of an FFN's adapters, which have the rows of its up projection: Zamba 2."""
    return tuple(
        path
        for path, module in modules.items()
        if path.startswith(f"{scope}.")
        and "adapter" in path.removeprefix(scope)
        and isinstance(module, nn.Linear)
        and len(module.weight) == up.num_rows
    )


def _stacks(modules: Modules) -> Iterator[FoundFFN]:
    """The blocks' experts that one module stacks in tensors, the innermost module that does."""
    around: set[str] = set()
    for path, module in reversed(modules.items()):
        is_other = any(NOT_FFN_PATH.search(part) for part in path.split("."))
        if path in around or is_other or block_of(path, modules) is None:
            continue
        found = stack_of(module)
        if found is None:
            continue
        parts = path.split(".")
        around |= {".".join(parts[:length]) for length in range(1, len(parts))}
        yield FoundFFN(
            path,
            f"{path}.*.up_proj",
            f"{path}.*.gate_proj" if found.is_gated else None,
            f"{path}.*.down_proj",
            found.width,
            found.hidden_size,
            interleaved=found.is_interleaved,
            experts=True,
            function=found.function,
            stack=found.stack,
            gate_half=found.gate_half,
            narrow_only=found.narrow_only,
            num_ffns=found.num_experts,
        )


MOST_MAPS = 32
"""No block has more linear maps outside its attention. What is found among more is found by chance."""
_Group = tuple[_Map, _Map | None, _Map, bool]


def _group(maps: Sequence[_Map], scope: str, modules: Modules) -> _Group | None:
    """Up, gate, down, and whether up holds the gate too, among a module's maps; None if nothing fits.

    Where several fit, those whose names have most in common.
    """
    if len(maps) > MOST_MAPS:
        return None
    named = bool(_FFN_WORDS.search(scope.rpartition(".")[2] + type(modules[scope]).__name__))
    choices = (
        [tuple(maps), *itertools.combinations(maps, 2)] if len(maps) == 3 else itertools.combinations(maps, 2)
    )
    fitting = [
        group
        for chosen in choices
        if (group := _fits(chosen, is_named=named and len(chosen) == len(maps))) is not None
    ]
    return max(fitting, key=_likeness) if fitting else None


def _fits(maps: Sequence[_Map], *, is_named: bool) -> _Group | None:
    """These maps as an FFN: ups [N, D], and a down projection [D, N], the last that can be one."""
    for index in reversed(range(len(maps))):
        down = maps[index]
        ups = [each for each in maps if each != down]
        pair = (down.num_columns, down.num_rows)
        is_square = down.num_columns == down.num_rows
        if is_square and not (is_named and index == len(maps) - 1):
            continue
        if all((each.num_rows, each.num_columns) == pair for each in ups):
            gates = [each for each in ups if _GATES.search(each.path)] or list(ups[:1])
            gate = gates[0] if len(ups) == 2 else None
            return next(each for each in ups if each != gate), gate, down, False
        (first, *others) = ups
        if not others and (first.num_rows, first.num_columns) == (2 * pair[0], pair[1]):
            return first, None, down, True
    return None


def _likeness(group: _Group) -> tuple[int, int]:
    up, gate, down, _ = group
    return 2 + (gate is not None), len(up.words & down.words)


class Expert(NamedTuple):
    """An expert that is a module of its own."""

    runner: str
    """The module that runs all experts of its block."""
    starred: str
    """The expert's path, with `*` for its number."""


def _expert_of(ffn: FoundFFN, modules: Modules) -> Expert | None:
    """The expert that an FFN is, if it is one of several in a module that sends tokens to them."""
    runner, _, name = ffn.scope.rpartition(".")
    starred = re.sub(r"\d+$", "*", name)
    parent = modules.get(runner)
    runs = isinstance(parent, nn.ModuleDict | nn.ModuleList) and "forward" in vars(type(parent))
    return Expert(runner, f"{runner}.{starred}") if runs and starred != name else None


def with_experts_joined(found: Sequence[FoundFFN], modules: Modules) -> list[FoundFFN]:
    """The FFNs, with one for all experts of a block that are modules of their own: the first."""
    joined: dict[str, FoundFFN] = {}
    for ffn in found:
        expert = _expert_of(ffn, modules)
        key = ffn.scope + ffn.up if expert is None else expert.starred
        if key in joined:
            joined[key] = joined[key]._replace(num_ffns=joined[key].num_ffns + 1)
        else:
            joined[key] = ffn._replace(starred=None if expert is None else expert.starred)
    return list(joined.values())


def _starred(path: str) -> str:
    """A path with `*` for its numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _is_norm_of(name: str, weight: nn.Parameter, ffn: FoundFFN) -> bool:
    """Whether a parameter in an FFN's scope is a norm over its neurons, between activation and down."""
    return weight.dim() == 1 and len(weight) == ffn.width != ffn.hidden_size and "norm" in name


def lists_in_words(modules: Modules) -> str:
    """The lists of blocks, and the linear layers of each, for a message."""
    lists = [
        f"{path}.* of {type(blocks[0]).__name__}: {_maps_in_words(blocks[0])}"
        for path, blocks in modules.items()
        if isinstance(blocks, nn.ModuleList) and len(blocks) and path
    ]
    return "; ".join(lists[:3]) or "no list of blocks"


def _maps_in_words(block: nn.Module) -> str:
    maps = [
        f"{path} {list(module.weight.shape)}"
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return ", ".join(maps[:6]) or "no linear layer"
