"""Finds the FFNs of a checkpoint or a model by the names of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

from ffsplit.errors import UnsupportedModelError
from ffsplit.ffn.activations import TRAINED
from ffsplit.ffn.shapes import FFNShape
from ffsplit.models.detection import architecture_of
from ffsplit.models.family import Architecture, FFNPaths, Tower, config_part
from ffsplit.models.names import TensorNames
from ffsplit.models.patterns import (
    as_regex,
    base_prefixes,
    down_patterns,
    join_paths,
    numbered,
    numbers_in,
)

# The FFNs of a checkpoint: the tensors of each, and its place in the model.
#
# Everything that follows works per FFN. Statistics, plans and compressed files use the numbers that
# `find_ffns` assigns: tower by tower, block by block, experts in order.

EXPERT_MULTIPLE = 8
"""torch multiplies experts in groups, of which each row must take a multiple of 16 bytes."""


class MatrixPlace(NamedTuple):
    """A matrix [out, in] in a file: a tensor, or a part of one."""

    name: str
    bias: str | None = None
    expert: int | None = None
    """Index of the matrix in a stack."""
    flat: int | None = None
    """How many matrices a stack has, if they lie one below the other, in a tensor of two dimensions."""
    half: int | None = None
    """Which half of the rows, 0 or 1, if gate and up share one tensor."""
    transposed: bool = False
    interleaved: bool = False
    """Whether the halves are every other row."""


@dataclass(frozen=True)
class FFNPlace:
    """One FFN of a model. Module paths are relative to the base model."""

    index: int
    name: str
    tower: Tower
    paths: FFNPaths
    block: str
    up: MatrixPlace
    gate: MatrixPlace | None
    down: MatrixPlace
    shape: FFNShape
    expert: int | None = None
    twins: tuple[str, ...] = ()
    """Other blocks that run the same FFN."""
    adapters: tuple[str, ...] = ()
    """Stored matrices with the rows of `up`, or of gate and up together."""
    unit: int = 0
    """For an expert, the index of the first FFN in its experts' module; otherwise its own index."""
    activation_tensors: Mapping[str, str] = field(default_factory=dict)
    """The stored names of the parameters of a trained activation, by their names in its module."""

    row_tensors: Mapping[str, str] = field(default_factory=dict)
    """The stored names of its tensors [N, ...] in `paths.per_neuron`, by their names in the block."""

    @property
    def split_path(self) -> str:
        """The module that a split FFN replaces."""
        return join_paths(self.block, self.paths.split_path)

    @property
    def split_prefix(self) -> str:
        """The prefix of a split FFN's tensor names, relative to the base model."""
        return f"{self.split_path}.{self.expert}" if self.is_stacked else self.split_path

    @property
    def is_stacked(self) -> bool:
        """Whether it is an expert that has no module of its own."""
        return self.paths.stack is not None

    @property
    def runner(self) -> str:
        """For an expert, the module that runs all experts of its block."""
        return self.split_path if self.is_stacked else self.split_path.rpartition(".")[0]

    @property
    def guard(self) -> str:
        """The tensor, relative to the base model, that is stored with a shape that cannot match."""
        return f"{self.split_path}.{self.paths.guard}"

    @property
    def matrices(self) -> tuple[MatrixPlace, ...]:
        return tuple(each for each in (self.up, self.gate, self.down) if each is not None)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor it is stored in, each once, weights first."""
        names = [each.name for each in self.matrices] + [each.bias for each in self.matrices if each.bias]
        return tuple(dict.fromkeys((*names, *self.row_tensors.values(), *self.adapters)))

    @property
    def width_key(self) -> tuple[str | None, str | None]:
        """The part of config.json, and the field in it, that state its width."""
        inner, _, field = (self.paths.width_field or "").rpartition(".")
        part = ".".join(each for each in (self.tower.config, inner) if each)
        return part or None, field or None


def without(ffns: Sequence[FFNPlace], left_out: Collection[str]) -> tuple[FFNPlace, ...]:
    """The FFNs but those of these names, and those of these towers (their `blocks`), numbered anew."""
    kept = [ffn for ffn in ffns if ffn.name not in left_out and ffn.tower.blocks not in left_out]
    index = {ffn.index: number for number, ffn in enumerate(kept)}
    return tuple(replace(ffn, index=index[ffn.index], unit=index[ffn.unit]) for ffn in kept)


def width_groups(ffns: Sequence[FFNPlace], *, left_out: Sequence[FFNPlace] = ()) -> tuple[int, ...]:
    """A group per FFN: those of a group have the width that one field states, or a multiple of it.

    -1: no config can state it, because it has no field, or one that FFNs that are left out share.
    """
    keys = list(dict.fromkeys(ffn.width_key for ffn in ffns))
    unstated = [ffn for ffn in ffns if ffn.paths.width_field is None]
    fixed = {ffn.width_key for ffn in (*left_out, *unstated)}
    return tuple(-1 if ffn.width_key in fixed else keys.index(ffn.width_key) for ffn in ffns)


class Shaped(Protocol):
    """A tensor, or its entry in a file's header."""

    @property
    def shape(self) -> Sequence[int]: ...


def find_ffns(
    architecture: Architecture,
    tensors: Mapping[str, Shaped],
    *,
    where: str,
    names: TensorNames,
    config: Mapping[str, Any] | None = None,
) -> tuple[str, tuple[FFNPlace, ...]]:
    """The prefix of the base model's tensors, and its FFNs.

    If the config states the number of blocks, tensors of later blocks are ignored. Raises
    UnsupportedModelError when there is no FFN, or one lacks a tensor.
    """
    found = base_prefixes(architecture, names)
    if len(found) != 1:
        first = down_patterns(architecture.towers[0])[0].replace("*", "0")
        what = f"tensor {names.stored(first)!r} below several prefixes ({', '.join(map(repr, found))})"
        raise UnsupportedModelError(
            f"{where}: {what if found else f'no tensor {names.stored(first)!r}'}, "
            f"where a {architecture.model_type} keeps its first FFN"
        )
    finder = _Finder(architecture, tensors, where, names=names, prefix=found[0])
    ffns = tuple(finder.ffns(config or {}))
    if architecture.num_ffns not in (None, len(ffns)):
        raise UnsupportedModelError(
            f"{where}: the model has {architecture.num_ffns} FFNs, and the files have {len(ffns)} of them: "
            "transformers joins or splits the tensors of the others in a way that FFSplit does not know"
        )
    return found[0], ffns


def ffns_of(model: Any, *, left_out: Collection[str] = ()) -> tuple[str, tuple[FFNPlace, ...]]:
    """The prefix of a model's base model (empty, or ending in a dot), and the FFNs below it.

    `left_out` are those that are not asked for, by name or by the `blocks` of their tower.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = model.named_parameters(remove_duplicate=False)
    tensors = {name: each for name, each in parameters if name not in tied}
    names = TensorNames(tensors, rules=())
    prefix, ffns = find_ffns(architecture_of(model), tensors, where=type(model).__name__, names=names)
    return prefix, without(ffns, left_out)


class _Finder:
    """Finds the FFNs of one checkpoint by the module names of its tensors."""

    def __init__(
        self,
        architecture: Architecture,
        tensors: Mapping[str, Shaped],
        where: str,
        *,
        names: TensorNames,
        prefix: str,
    ) -> None:
        self._row, self._tensors, self._where = architecture, tensors, where
        self._names, self._prefix = names, prefix

    def ffns(self, config: Mapping[str, Any]) -> list[FFNPlace]:
        found: list[FFNPlace] = []
        for tower in self._row.towers:
            for block in self._blocks(tower, config):
                before = len(found)
                for paths in tower.ffns:
                    if paths.blocks and block not in paths.blocks:
                        continue
                    find = self._stacked if self._is_stacked(paths, block) else self._separate
                    found += find(tower, paths, block, first=len(found))
                if len(found) == before:
                    raise self._missing(self._weight(tower, tower.ffns[0].up, block, 0))
        return found

    def _blocks(self, tower: Tower, config: Mapping[str, Any]) -> list[str]:
        """The module paths of a tower's blocks, in order; empty if it has no FFN.

        If the config states their number, it counts, because the model will have that many. If the tensors
        tell which blocks have an FFN, there may be others between them.
        """
        depth = tower.blocks.count("*")
        numbers = [as_regex(name).replace(r"\d+", r"(\d+)", depth) for name in down_patterns(tower)]
        regexes = [re.compile(re.escape(self._prefix) + each) for each in numbers]
        modules = self._names.modules
        matches = [match for name in modules for regex in regexes if (match := regex.fullmatch(name))]
        present = {tuple(int(match[1 + index]) for index in range(depth)) for match in matches}
        if tower.is_list and tower.layers_field is not None and present:
            stated = config_part(config, tower.config).get(tower.layers_field)
            count = next(index for index in range(len(present) + 1) if (index,) not in present)
            present = {(index,) for index in range(stated if isinstance(stated, int) and stated else count)}
        return [numbered(tower.blocks, numbers) for numbers in sorted(present)]

    def _is_stacked(self, paths: FFNPaths, block: str) -> bool:
        if paths.stack is None:
            return False
        name = f"{self._prefix}{join_paths(block, paths.module or '')}.{paths.stack.down}"
        return name in self._names.modules

    def _stacked(self, tower: Tower, paths: FFNPaths, block: str, *, first: int) -> Iterator[FFNPlace]:
        """Experts stacked in one tensor of each kind."""
        stack = paths.stack
        assert stack is not None
        base = f"{self._prefix}{join_paths(block, paths.module or '')}."

        def place(path: str, expert: int, *, half: int | None = None) -> MatrixPlace:
            bias = f"{base}{path}_bias"
            name = self._names.stored(base + path)
            if base + path not in self._names.modules:
                part = None if half is None else self._names.part_of(base + path, half)
                joined = self._names.half_of(base + path)
                name, half = (part, None) if part else joined or (name, half)
            return MatrixPlace(
                name,
                self._names.stored(bias) if bias in self._names.modules else None,
                expert=expert,
                flat=stack.flat,
                half=half,
                transposed=stack.down_transposed if path == stack.down else stack.transposed,
                interleaved=paths.interleaved or self._names.is_interleaved(name),
            )

        num_experts, *_ = stack.sides(self._tensors[self._names.stored(base + stack.down)].shape)
        for expert in range(num_experts):
            gate = None
            if stack.gate is not None:
                up, gate = place(stack.up, expert), place(stack.gate, expert)
            elif paths.gate is not None:
                up = place(stack.up, expert, half=1 - paths.gate_half)
                gate = place(stack.up, expert, half=paths.gate_half)
            else:
                up = place(stack.up, expert)
            down = place(stack.down, expert)
            yield self._place(tower, paths, block, up, gate, down, first=first, expert=expert)

    def _separate(self, tower: Tower, paths: FFNPaths, block: str, *, first: int) -> Iterator[FFNPlace]:
        """The FFN at these paths, if there is one, or every expert stored separately there."""
        expert = 0
        while True:
            halves = (1 - paths.gate_half, paths.gate_half) if paths.fused else (None, None)
            up = self._matrix(tower, paths, paths.up, block, expert, half=halves[0])
            gate_path = paths.up if paths.fused else paths.gate
            if up is None:
                return
            gate, down = (
                None if path is None else self._matrix(tower, paths, path, block, expert, half=half)
                for path, half in ((gate_path, halves[1]), (paths.down, None))
            )
            for path, found in ((gate_path, gate), (paths.down, down)):
                if path is not None and found is None:
                    raise self._missing(self._weight(tower, path, block, expert))
            assert down is not None
            yield self._place(
                tower, paths, block, up, gate, down, first=first, expert=expert if paths.experts else None
            )
            expert += 1
            if not paths.experts:
                return

    def _matrix(
        self, tower: Tower, paths: FFNPaths, path: str, block: str, expert: int, *, half: int | None
    ) -> MatrixPlace | None:
        name = self._weight(tower, path, block, expert)
        if name not in self._names.modules:
            return self._converted(name, half=half)
        bias = f"{name.removesuffix('weight')}bias"
        found = self._names.stored(bias) if bias in self._names.modules else None
        return MatrixPlace(
            self._names.stored(name),
            found,
            half=half,
            transposed=paths.transposed,
            interleaved=paths.interleaved,
        )

    def _converted(self, name: str, *, half: int | None) -> MatrixPlace | None:
        """A matrix that transformers joins with another, or splits from it, as it loads the file."""

        def place(name: str) -> MatrixPlace | None:
            if half is not None:
                stored = self._names.part_of(name, half)
                return None if stored is None else MatrixPlace(stored)
            found = self._names.half_of(name)
            if found is None:
                return None
            return MatrixPlace(found[0], half=found[1], interleaved=self._names.is_interleaved(found[0]))

        weight, bias = place(name), place(f"{name.removesuffix('weight')}bias")
        return weight if weight is None or bias is None else weight._replace(bias=bias.name)

    def _weight(self, tower: Tower, path: str, block: str, expert: int) -> str:
        """The name of a weight in one block, as its module has it."""
        return f"{self._prefix}{numbered(join_paths(block, path), (expert,))}.weight"

    def _missing(self, name: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._where}: {self._names.stored(name)} is missing or not a matrix")

    def _place(
        self,
        tower: Tower,
        paths: FFNPaths,
        block: str,
        up: MatrixPlace,
        gate: MatrixPlace | None,
        down: MatrixPlace,
        *,
        first: int,
        expert: int | None,
    ) -> FFNPlace:
        numbers = numbers_in(block, tower.blocks)
        layer = f"layer {'.'.join(map(str, numbers))}" if tower.is_list else ""
        number = "" if expert is None else f"expert {expert}"
        name = " ".join(part for part in (tower.name, layer, paths.label, number) if part)
        sizes = list(self._tensors[down.name].shape[-2:])
        if len(sizes) != 2:
            raise UnsupportedModelError(f"{self._where}: {down.name} is missing or not a matrix")
        sizes[0] //= down.flat or 1
        width = sizes[0] if down.transposed else sizes[1]
        rows = self._rows(paths, block)
        shape = FFNShape(
            num_neurons=width,
            hidden_size=sizes[1] if down.transposed else sizes[0],
            gated=gate is not None,
            up_bias=up.bias is not None,
            down_bias=down.bias is not None,
            per_neuron=sum(math.prod(self._tensors[stored].shape[1:]) for stored in rows.values()),
            width_multiple=1 if paths.stack is None else EXPERT_MULTIPLE,
        )
        if expert is not None and paths.stack is None:
            paths = paths.of_expert(expert)
        return FFNPlace(
            first + (expert or 0),
            name,
            tower,
            paths,
            block,
            up,
            gate,
            down,
            shape,
            expert=expert,
            twins=tuple(twin for one, twin in self._row.twins if one == block),
            adapters=tuple(self._adapters(paths, block)),
            unit=first,
            activation_tensors=self._trained(paths, block),
            row_tensors=rows,
        )

    def _rows(self, paths: FFNPaths, block: str) -> dict[str, str]:
        """The stored names of the tensors [N, ...] between up projection and activation."""
        kinds = ("weight", "bias", "running_mean", "running_var")
        names = [f"{path}.{kind}" for path in paths.per_neuron for kind in kinds]
        stored = {name: self._names.modules.get(f"{self._prefix}{block}.{name}") for name in names}
        return {name: found for name, found in stored.items() if found is not None}

    def _trained(self, paths: FFNPaths, block: str) -> dict[str, str]:
        """The stored names of a trained activation's parameters. All neurons must share them."""
        if not paths.trained:
            return {}
        module = f"{self._prefix}{join_paths(block, paths.activation or '')}"
        known = {each.name for kind in TRAINED.values() for each in fields(kind)}
        modules = self._names.modules
        found = {name: modules[f"{module}.{name}"] for name in known if f"{module}.{name}" in modules}
        for stored in found.values():
            if math.prod(self._tensors[stored].shape) != 1:
                raise UnsupportedModelError(
                    f"{self._where}: {stored} has {math.prod(self._tensors[stored].shape)} elements, and "
                    "FFSplit compresses an FFN with a trained activation only if all neurons share its "
                    "parameters; no recipe can compress this model"
                )
        return found

    def _adapters(self, paths: FFNPaths, block: str) -> Iterator[str]:
        """The stored names of the adapters that add to an FFN's up projection."""
        if paths.adapters is None:
            return
        regex = re.compile(f"{re.escape(self._prefix)}{as_regex(join_paths(block, paths.adapters))}\\.weight")
        yield from (stored for name, stored in self._names.modules.items() if regex.fullmatch(name))
