"""A feed-forward network as data: its shape, its parts, and what each part costs.

A layer's FFN is a sum over parts, each a subset of its neurons. A part holds two or three linear maps
(up, down, and gate if the FFN is gated), each stored in some format. Layouts are plain records. They state
exactly how many elements and bytes a layer takes, before any tensor exists. An artifact's `config.json`
contains them, so that the layer can be rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from ffsplit.config import Record

FAST_MULTIPLES = (64, 32, 16, 8)
"""Widths and ranks that kernels like, the best first: 64 and its multiples fill every tile."""
MOST_OF_FFN, MOST_OF_SIZE = 50, 12
"""Rounding to one of these gives up less than 1/50 of the FFN's elements, and 1/12 of the width or rank."""


class Dense(Record):
    """A plain weight matrix."""

    format: Literal["dense"] = "dense"

    def num_elements(self, num_rows: int, num_columns: int) -> int:
        return num_rows * num_columns

    def size_bytes(self, num_rows: int, num_columns: int, itemsize: int) -> int:
        return self.num_elements(num_rows, num_columns) * itemsize


class LowRank(Record):
    """Two factors, left [rows, rank] and right [rank, columns]."""

    format: Literal["low_rank"] = "low_rank"
    rank: int = Field(ge=1)

    def num_elements(self, num_rows: int, num_columns: int) -> int:
        return self.rank * (num_rows + num_columns)

    def size_bytes(self, num_rows: int, num_columns: int, itemsize: int) -> int:
        return self.num_elements(num_rows, num_columns) * itemsize


class Integer(Record):
    """Integers of 4 or 8 bits, with a bfloat16 scale per output row or per group of `group_size` columns."""

    format: Literal["integer"] = "integer"
    num_bits: Literal[4, 8]
    group_size: int | None = None

    def num_elements(self, num_rows: int, num_columns: int) -> int:
        return num_rows * num_columns

    def size_bytes(self, num_rows: int, num_columns: int, itemsize: int) -> int:
        num_groups = 1 if self.group_size is None else -(-num_columns // self.group_size)
        return num_rows * (-(-num_columns * self.num_bits // 8) + 2 * num_groups)


Format = Annotated[Dense | LowRank | Integer, Field(discriminator="format")]


class FFNShape(Record):
    """The shape of one layer's dense FFN."""

    num_neurons: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    gated: bool
    up_bias: bool
    down_bias: bool
    per_neuron: int = Field(
        default=0,
        ge=0,
        description="of a neuron between up projection and activation: a convolution's kernel",
    )
    width_multiple: int = Field(
        default=1,
        ge=1,
        description="of a narrower width, where kernels need one: grouped experts",
    )

    @property
    def elements_per_neuron(self) -> int:
        """Elements per dense neuron: a row of each input matrix, a column of down, its biases and kernel."""
        inputs = 2 if self.gated else 1
        return inputs * (self.hidden_size + self.up_bias) + self.per_neuron + self.hidden_size

    @property
    def num_elements(self) -> int:
        return self.num_neurons * self.elements_per_neuron + self.hidden_size * self.down_bias


class PartLayout(Record):
    """How one subset of the neurons is stored."""

    num_neurons: int = Field(ge=1)
    up: Format = Dense()
    gate: Format | None = None
    down: Format = Dense()

    @classmethod
    def dense(cls, shape: FFNShape, num_neurons: int) -> PartLayout:
        return cls(num_neurons=num_neurons, gate=Dense() if shape.gated else None)

    @property
    def formats(self) -> tuple[Dense | LowRank | Integer, ...]:
        return tuple(linear for linear in (self.up, self.gate, self.down) if linear is not None)

    @property
    def is_dense(self) -> bool:
        return all(isinstance(linear, Dense) for linear in self.formats)

    @property
    def is_fused(self) -> bool:
        """Whether a checkpoint stores gate and up as one matrix: they share a format that is not low rank."""
        return self.gate == self.up and not isinstance(self.up, LowRank)

    def _maps(self, shape: FFNShape) -> list[tuple[Dense | LowRank | Integer, int, int]]:
        maps = [
            (self.up, self.num_neurons, shape.hidden_size),
            (self.down, shape.hidden_size, self.num_neurons),
        ]
        if self.gate is not None:
            maps.append((self.gate, self.num_neurons, shape.hidden_size))
        return maps

    def num_biases(self, shape: FFNShape) -> int:
        """Elements besides the matrices: biases, and what lies between up projection and activation."""
        return self.num_neurons * (shape.up_bias * (2 if shape.gated else 1) + shape.per_neuron)

    def num_elements(self, shape: FFNShape) -> int:
        maps = sum(linear.num_elements(rows, columns) for linear, rows, columns in self._maps(shape))
        return maps + self.num_biases(shape)

    def size_bytes(self, shape: FFNShape, itemsize: int) -> int:
        maps = sum(linear.size_bytes(rows, columns, itemsize) for linear, rows, columns in self._maps(shape))
        return maps + self.num_biases(shape) * itemsize


class LayerLayout(Record):
    """How one layer's FFN is stored: its heavy hitters, the rest, and whether its output has a bias.

    An expert without any part is dropped.
    """

    heavy: PartLayout | None
    light: PartLayout | None
    down_bias: bool

    @classmethod
    def dense(cls, shape: FFNShape, num_neurons: int | None = None) -> LayerLayout:
        """An ordinary FFN of `num_neurons` neurons, all of them when None."""
        part = PartLayout.dense(shape, num_neurons or shape.num_neurons)
        return cls(heavy=part, light=None, down_bias=shape.down_bias)

    @classmethod
    def dropped(cls) -> LayerLayout:
        """Nothing: an expert that is left out of its mixture."""
        return cls(heavy=None, light=None, down_bias=False)

    @property
    def is_dropped(self) -> bool:
        return not self.parts

    @property
    def parts(self) -> tuple[PartLayout, ...]:
        return tuple(part for part in (self.heavy, self.light) if part is not None)

    @property
    def is_dense(self) -> bool:
        """One dense part: the form of an ordinary FFN, perhaps with fewer neurons."""
        return len(self.parts) == 1 and self.parts[0].is_dense

    def is_whole(self, shape: FFNShape) -> bool:
        """Whether nothing was done to the FFN: it has all its neurons, as they were."""
        return self.folded == LayerLayout.dense(shape)

    @property
    def can_fold(self) -> bool:
        """Whether a checkpoint stores both parts as one: their matrices share a format that allows it.

        Integers allow it if neither a group of columns, which shares a scale, nor a byte spans both parts.
        """
        if self.heavy is None or self.light is None:
            return False
        formats = {*self.heavy.formats, *self.light.formats}
        (first, *others) = formats
        if others or isinstance(first, LowRank):
            return False
        if isinstance(first, Dense):
            return True
        width = self.heavy.num_neurons
        return first.group_size is not None and width % first.group_size == 0 and width % 2 == 0

    @property
    def folded(self) -> LayerLayout:
        """The layout in a checkpoint, which stores both parts as one if it can."""
        if not self.can_fold:
            return self
        assert self.heavy is not None
        heavy = self.heavy.model_copy(update={"num_neurons": self.num_neurons})
        return self.model_copy(update={"heavy": heavy, "light": None})

    @property
    def num_neurons(self) -> int:
        return sum(part.num_neurons for part in self.parts)

    def num_elements(self, shape: FFNShape) -> int:
        return sum(part.num_elements(shape) for part in self.parts) + shape.hidden_size * self.down_bias

    def size_bytes(self, shape: FFNShape, itemsize: int) -> int:
        parts = sum(part.size_bytes(shape, itemsize) for part in self.parts)
        return parts + shape.hidden_size * self.down_bias * itemsize


def rounded_down(size: int, *, multiple: int | None, cost: int, whole: int) -> int:
    """Round a width or rank down to a multiple of `multiple`; None: of the largest fast one that is near.

    Fast ones are 64, 32, 16 and 8. An FFN has `whole` elements, of which each unit of the size takes `cost`.
    A multiple is near if rounding gives up less than 2 % of the FFN's elements and less than a twelfth of
    the size. If none is near, the size stays as it is. A `multiple` is binding: the result is 0 if the size
    is below it.
    """
    if multiple is not None:
        return size - size % multiple
    for each in FAST_MULTIPLES:
        lost = size % each
        if MOST_OF_FFN * lost * cost < whole and MOST_OF_SIZE * lost < size:
            return size - lost
    return size


def is_narrowed_form(layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape]) -> bool:
    """Whether these FFNs differ from the original's only in width: dense, no added bias, or dropped."""
    pairs = zip(layouts, shapes, strict=True)
    return all(
        layout.is_dropped or (layout.folded.is_dense and layout.down_bias == shape.down_bias)
        for layout, shape in pairs
    )


def is_stock_form(
    layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape], *, groups: Sequence[int] | None = None
) -> bool:
    """Whether stock modelling code can hold these FFNs: narrowed, by one fraction per group.

    `groups` are as in `ModelShape.width_groups`.
    """
    if not is_narrowed_form(layouts, shapes):
        return False
    groups = groups or (0,) * len(layouts)
    fractions: dict[int, set[Fraction]] = {}
    for layout, shape, group in zip(layouts, shapes, groups, strict=True):
        if layout.is_dropped:
            continue
        if group < 0 and layout.num_neurons != shape.num_neurons:
            return False
        fractions.setdefault(group, set()).add(Fraction(layout.num_neurons, shape.num_neurons))
    return all(len(each) == 1 for group, each in fractions.items() if group >= 0)


class Mixture(Record):
    """The experts of a model, as many in each block, and what its router needs of them.

    They are in as many groups of neighbours, each of which must keep the same number of experts.
    """

    num_experts: int = Field(ge=1, description="per block")
    fewest: int = Field(ge=1, description="experts that must stay in each block: a token is sent to as many")
    num_groups: int = Field(ge=1)
    firsts: tuple[int, ...] = Field(min_length=1, description="index of the first expert of each block")
    router_elements: int = Field(ge=0, description="elements of all routers that go with one expert of each")

    def experts_of(self, first: int) -> range:
        """The indices of a block's experts."""
        return range(first, first + self.num_experts)

    @property
    def indices(self) -> frozenset[int]:
        """The indices of all experts."""
        return frozenset(index for first in self.firsts for index in self.experts_of(first))

    def num_dropped(self, layouts: Sequence[LayerLayout]) -> int:
        """How many experts of each block are dropped."""
        return sum(layouts[index].is_dropped for index in self.experts_of(self.firsts[0]))


class ModelShape(Record):
    """What a budget needs to know about a dense model: its FFNs, and the size of the rest."""

    shapes: tuple[FFNShape, ...] = Field(min_length=1, description="one per layer")
    itemsize: int = Field(ge=1, description="bytes per element of the FFNs' weights")
    num_parameters: int = Field(ge=1)
    num_parameters_without_embeddings: int = Field(ge=1, description="of the blocks: no embeddings, no heads")
    width_groups: tuple[int, ...] | None = Field(
        default=None,
        description="FFNs of one group have the width that one field of config.json states, or a multiple "
        "of it; -1: no field states it. None: all are in one group",
    )
    mixture: Mixture | None = Field(default=None, description="None if no experts may be dropped")

    @property
    def ffn_elements(self) -> int:
        return sum(shape.num_elements for shape in self.shapes)

    @property
    def ffn_bytes(self) -> int:
        return self.ffn_elements * self.itemsize

    def elements_of(self, layouts: Sequence[LayerLayout]) -> int:
        """Elements of FFNs stored in these layouts."""
        return sum(layout.num_elements(shape) for layout, shape in zip(layouts, self.shapes, strict=True))

    def bytes_of(self, layouts: Sequence[LayerLayout]) -> int:
        """Bytes of FFNs stored in these layouts."""
        pairs = zip(layouts, self.shapes, strict=True)
        return sum(layout.size_bytes(shape, self.itemsize) for layout, shape in pairs)

    def parameters_of(self, layouts: Sequence[LayerLayout]) -> int:
        """Parameters of the whole model with FFNs in these layouts."""
        return self._without_dropped(self.num_parameters, layouts)

    def parameters_in_blocks_of(self, layouts: Sequence[LayerLayout]) -> int:
        """Parameters of the blocks, without embeddings and heads, with FFNs in these layouts."""
        return self._without_dropped(self.num_parameters_without_embeddings, layouts)

    def _without_dropped(self, num_parameters: int, layouts: Sequence[LayerLayout]) -> int:
        mixture = self.mixture
        routers = 0 if mixture is None else mixture.router_elements * mixture.num_dropped(layouts)
        return num_parameters - self.ffn_elements + self.elements_of(layouts) - routers
