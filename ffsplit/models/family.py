"""The records that make up a row of the table, and functions that build rows for families that are alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ffsplit.config import Record
from ffsplit.ffn.activations import OTHER_NAMES, changes_up

if TYPE_CHECKING:
    from torch import Tensor

# The records that say where a model family keeps its feed-forward networks.
#
# A row is a family. It has towers (an encoder, a decoder, a text and a vision model: one list of blocks
# each), and a tower lists the FFNs that its blocks may have. The tensors decide which of them a checkpoint
# has: a row may name a decoder, a gate or experts that some models of the family lack.

Medium = Literal["text", "image", "sound", "video"]
"""What a row of calibration data holds, and what the tokens of a tower are made from."""
Media = tuple[Medium, ...]
TEXT: Media = ("text",)
Makes = Literal["states", "next_tokens", "target", "embeddings"]
"""What a model makes of a row, which is what is compared: states (or a head's logits), the logits of each
token from those before it, those of a decoder's target text, or one embedding for each medium."""
WIDTH_WORDS = re.compile(r"intermediate|ffn|inner|mlp|feed_?forward|d_ff|hidden_dim|expert")
"""In the names of a config's fields, or a module's attributes, that may state an FFN's width."""


Call = Literal["routed", "repeated", "every", "grouped"]
"""What the module that runs experts is given: `routed`, the states, each token's experts and their weights;
`repeated`, the states once for each expert, zero for those that a token does not go to; `every`, the states
alone, because all experts run for each token; `grouped`, the states of the first expert, then of the next,
and how many these are, in the first of its linear maps."""


class Stack(Record):
    """How a module keeps all experts of a block: tensors [experts, out, in], by their paths below it."""

    up: str = "gate_up_proj"
    gate: str | None = Field(default=None, description="None: `up` holds its rows too, if there is one")
    down: str = "down_proj"
    transposed: bool = Field(default=False, description="up and gate are [experts, in, out]")
    down_transposed: bool = Field(default=False, description="down is [experts, in, out]")
    flat: int | None = Field(
        default=None,
        description="the number of experts, whose matrices lie one below the other: two dimensions",
    )
    call: Call = "routed"

    def sides(self, shape: Sequence[int], *, is_down: bool = False) -> tuple[int, int, int]:
        """The number of experts, and the outputs and inputs of each, of a tensor of this shape."""
        first, second = shape[-2:]
        if self.flat:
            first //= self.flat
        if self.down_transposed if is_down else self.transposed:
            first, second = second, first
        return self.flat or shape[0], first, second

    def shape(self, num_experts: int, width: int, hidden_size: int, *, is_down: bool) -> tuple[int, ...]:
        """The shape of the tensor of as many experts."""
        sides = [hidden_size, width] if is_down else [width, hidden_size]
        if self.down_transposed if is_down else self.transposed:
            sides.reverse()
        return (num_experts * sides[0], sides[1]) if self.flat else (num_experts, *sides)

    def matrices(self, tensor: Tensor, *, is_down: bool = False) -> Tensor:
        """A view of a tensor as [experts, out, in]."""
        each = tensor.view(self.flat, -1, tensor.shape[-1]) if self.flat else tensor
        return each.transpose(1, 2) if (self.down_transposed if is_down else self.transposed) else each


class FFNPaths(Record):
    """One FFN of a block. Paths are relative to the block.

    If the whole FFN is one module, `module` names it. If it is spread over the block, `module` is None: a
    split FFN then replaces `up`, and `activation` and `down` become identities.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = Field(default=False, description="`up` holds the rows of the gate, then its own")
    transposed: bool = Field(default=False, description="weights are [in, out]: transformers' Conv1D")
    gate_half: int = Field(default=0, description="fused: which half of the rows is the gate")
    interleaved: bool = Field(default=False, description="fused: rows of gate and up by turns")
    experts: bool = Field(
        default=False,
        description="one FFN for each `*` in the paths; `module` runs all, or, with a `*`, one",
    )
    stack: Stack | None = Field(default=None, description="how `module` keeps experts")
    narrow_only: bool = Field(default=False, description="only `module`'s own code can run it")
    adapters: str | None = Field(
        default=None, description="matrices with the rows of `up`, of which a block's call adds one to it"
    )
    module: str | None = None
    activation: str | None = Field(
        default=None, description="the module of its activation: needed without `module`, or if it is trained"
    )
    trained: bool = Field(
        default=False, description="its activation has parameters, which stay where they are"
    )
    per_neuron: tuple[str, ...] = Field(
        default=(),
        description="modules between `up` and its activation that treat each neuron by itself: a depthwise "
        "convolution, a batch norm",
    )
    function: str | None = Field(default=None, description="its activation, if not its tower's")
    blocks: tuple[str, ...] = Field(
        default=(), description="the blocks that have it, where others have another at its place; (): all"
    )
    output_norm: str | None = Field(default=None, description="the layer norm of x + FFN(x), if there is one")
    width_field: str | None = Field(default="intermediate_size", description="None: no config can state it")
    width_factor: int = Field(default=1, ge=1, description="the width is so many times the field's value")
    reads: Medium | None = Field(default=None, description="which tokens it sees, if not all of its tower's")
    label: str = Field(default="", description="distinguishes it from the block's other FFNs")

    @property
    def can_split(self) -> bool:
        """Whether modules can be replaced by a split FFN: else a compressed FFN may only be narrower."""
        if self.narrow_only or (self.function is not None and changes_up(self.function)):
            return False
        if self.per_neuron or (self.trained and self.module is None):
            return False
        return self.module is not None or (self.activation is not None and self.gate is None)

    def of_expert(self, expert: int) -> FFNPaths:
        """The paths of one expert that is a module of its own."""
        found = {name: getattr(self, name) for name in ("up", "gate", "down", "module")}
        return self.model_copy(
            update={name: path and path.replace("*", str(expert)) for name, path in found.items()}
        )

    @property
    def split_path(self) -> str:
        """The module, relative to a block, that a split FFN replaces."""
        return self.module if self.module is not None else self.up

    @property
    def trained_in_module(self) -> str | None:
        """A trained activation, relative to `module`; None if it is not trained."""
        assert not self.trained or (self.activation is not None and self.module is not None)
        return (self.activation or "").removeprefix(f"{self.module}.") if self.trained else None

    @property
    def guard(self) -> str:
        """The tensor, relative to `split_path`, that a split FFN stores with a shape that cannot match."""
        if self.stack is not None:
            return self.stack.down
        path = self.down if self.module is not None else self.up
        return f"{path}.weight".removeprefix(f"{self.split_path}.")


class Tower(Record):
    """One list of blocks (`blocks` ends in `.*`), or a single block, relative to the base model.

    Lists may be nested, with a `*` for the index in each: `encoder.layers.*.blocks.*`.
    """

    blocks: str
    ffns: tuple[FFNPaths, ...]
    name: str = ""
    config: str | None = Field(default=None, description="its part of config.json, as a dotted path")
    layers_field: str | None = Field(
        default="num_hidden_layers",
        description="the number of blocks, all with an FFN; None: the tensors tell which have one",
    )
    activation_field: str | None = "hidden_act"
    default_activation: str = "gelu"
    norm_eps: float = 1e-12
    reads: Medium = "text"
    mask: str | None = Field(
        default="attention_mask", description="the mask of tokens without padding; None: all positions"
    )

    @property
    def is_list(self) -> bool:
        return self.blocks.endswith(".*")

    @property
    def path(self) -> str:
        """The list of blocks, or the single block."""
        return self.blocks.removesuffix(".*")


class Architecture(Record):
    """One model family, by the `model_type` of its config.json."""

    model_type: str
    reads: Media = Field(default=TEXT, description="what a row of calibration data must hold")
    may_read: Media = Field(default=(), description="what it may hold besides")
    makes: Makes = "states"
    towers: tuple[Tower, ...]
    file_names: tuple[tuple[str, str], ...] = Field(
        default=(), description="parts of a module's path and their names in files, replaced in this order"
    )
    position_offset: int = Field(default=0, description="positions reserved before the first token")
    positions_field: str = "max_position_embeddings"
    base: str | None = Field(
        default=None, description="the base model's name in models with a head; None: any name"
    )

    twins: tuple[tuple[str, str], ...] = Field(
        default=(), description="a block, and another that runs the same FFN, of the same weights"
    )
    num_ffns: int | None = Field(
        default=None, description="how many the model has, each expert counted; None: the tensors tell"
    )

    def reached_by(self, media: Media) -> tuple[Tower, ...]:
        """The towers that rows of these media reach; all, if they reach none."""
        found = tuple(tower for tower in self.towers if tower.reads in media)
        return found or self.towers

    def reaches(self, tower: Tower, ffn: FFNPaths, media: Media) -> bool:
        """Whether rows of these media reach an FFN."""
        return tower in self.reached_by(media) and (ffn.reads is None or ffn.reads in media)

    def can_heal(self, media: Media = TEXT) -> bool:
        """Whether it can be trained to reproduce its original's outputs on rows of these media.

        Healing reads single texts. Experts cannot be healed.
        """
        experts = any(ffn.experts for tower in self.towers for ffn in tower.ffns)
        return self.reads_text_alone(media) and not experts

    def can_stream(self, media: Media = TEXT) -> bool:
        """Whether rows of these media can go through it one block at a time.

        They must be single texts, and reach one list of blocks, each with an FFN of its own.
        """
        (tower, *others) = self.reached_by(media)
        if self.twins or any(ffn.adapters for ffn in tower.ffns):
            return False
        is_one_list = not others and bool(tower.mask) and tower.is_list and tower.blocks.count("*") == 1
        return is_one_list and self.reads_text_alone(media)

    def reads_text_alone(self, media: Media) -> bool:
        """Whether a row of these media is a single text."""
        return media == TEXT and self.reads == TEXT and self.makes in ("states", "next_tokens")


def config_part(config: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """A tower's part of a config; empty if the config lacks it."""
    for key in name.split(".") if name else ():
        part = config.get(key)
        config = part if isinstance(part, Mapping) else {}
    return config


def class_named(config: Mapping[str, Any]) -> str:
    """The class that a checkpoint was saved from, according to its config, or ""."""
    return str((config.get("architectures") or [""])[0])


def activation_name(config: Mapping[str, Any], tower: Tower) -> str:
    """The name of a tower's activation function in its part of a config."""
    field = tower.activation_field
    stated = config_part(config, tower.config).get(field) if field else None
    name = str(stated or tower.default_activation)
    return OTHER_NAMES.get(name, name)


def row(
    model_type: str, makes: Makes, blocks: str, *ffns: FFNPaths, options: Any = (), **tower: Any
) -> Architecture:
    """A family with one tower. `options` are fields of the row; other keywords are fields of its tower."""
    towers = (Tower(blocks=blocks, ffns=ffns, **tower),)
    reads = (towers[0].reads,)
    return Architecture(model_type=model_type, reads=reads, makes=makes, towers=towers, **dict(options))


def bert_like(model_type: str, *, norm_eps: float = 1e-12, **options: Any) -> Architecture:
    ffn = FFNPaths(
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        output_norm="output.LayerNorm",
    )
    return row(model_type, "states", "encoder.layer.*", ffn, norm_eps=norm_eps, options=options)


def mlp(up: str, down: str, **options: Any) -> FFNPaths:
    return FFNPaths(up=f"mlp.{up}", down=f"mlp.{down}", **{"module": "mlp", **options})


LLAMA_MLP = mlp("up_proj", "down_proj", gate="mlp.gate_proj")
NEOX_MLP = ("dense_h_to_4h", "dense_4h_to_h")


def llama_like(model_type: str, *more: FFNPaths, blocks: str = "layers.*", **tower: Any) -> Architecture:
    tower = {"default_activation": "silu", **tower}
    return row(model_type, "next_tokens", blocks, LLAMA_MLP, *more, **tower)


def experts(**options: Any) -> FFNPaths:
    path = "mlp.experts"
    return FFNPaths(
        up=f"{path}.*.up_proj",
        gate=f"{path}.*.gate_proj",
        down=f"{path}.*.down_proj",
        experts=True,
        stack=Stack(),
        module=path,
        **options,
    )


def shared_expert() -> FFNPaths:
    path = "mlp.shared_expert"
    return FFNPaths(
        up=f"{path}.up_proj",
        gate=f"{path}.gate_proj",
        down=f"{path}.down_proj",
        module=path,
        width_field="shared_expert_intermediate_size",
        label="shared expert",
    )


def fc_ffn(width_field: str, *, output_norm: str | None = None) -> FFNPaths:
    """Two linear layers directly in the block."""
    return FFNPaths(
        up="fc1", down="fc2", activation="activation_fn", width_field=width_field, output_norm=output_norm
    )


def bart_like(
    model_type: str,
    *,
    reads: Medium = "text",
    encoder_mask: str | None,
    output_norm: str | None,
    **options: Any,
) -> Architecture:
    def tower(side: str, mask: str | None) -> Tower:
        return Tower(
            name=side,
            blocks=f"{side}.layers.*",
            ffns=(fc_ffn(f"{side}_ffn_dim", output_norm=output_norm),),
            layers_field=f"{side}_layers",
            activation_field="activation_function",
            norm_eps=1e-5,
            reads=reads if side == "encoder" else "text",
            mask=mask,
        )

    towers = (tower("encoder", encoder_mask), tower("decoder", "decoder_attention_mask"))
    media = tuple(dict.fromkeys((reads, *TEXT)))
    return Architecture(model_type=model_type, reads=media, makes="target", towers=towers, **options)


def t5_like(model_type: str) -> Architecture:
    def tower(side: str, layer: int, layers_field: str, mask: str) -> Tower:
        path = f"layer.{layer}.DenseReluDense"
        shared: dict[str, Any] = {"down": f"{path}.wo", "module": path, "width_field": "d_ff"}
        return Tower(
            name=side,
            blocks=f"{side}.block.*",
            ffns=(
                FFNPaths(up=f"{path}.wi", **shared),
                FFNPaths(up=f"{path}.wi_1", gate=f"{path}.wi_0", **shared),
            ),
            layers_field=layers_field,
            activation_field="feed_forward_proj",
            default_activation="relu",
            mask=mask,
        )

    towers = (
        tower("encoder", 1, "num_layers", "attention_mask"),
        tower("decoder", 2, "num_decoder_layers", "decoder_attention_mask"),
    )
    return Architecture(model_type=model_type, makes="target", towers=towers)


def clip_like(model_type: str, *, activation: str, text_mask: str | None, head: bool) -> Architecture:
    def tower(side: str, blocks: str, mask: str | None) -> Tower:
        return Tower(
            name=side.replace("_", " "),
            blocks=blocks,
            ffns=(mlp("fc1", "fc2"),),
            config=f"{side.partition('_')[0]}_config",
            default_activation=activation,
            reads="image" if side.startswith("vision") else "text",
            mask=mask,
        )

    towers = [
        tower("text", "text_model.encoder.layers.*", text_mask),
        tower("vision", "vision_model.encoder.layers.*", None),
    ]
    if head:
        towers.append(tower("vision_head", "vision_model.head", None))
    media: Media = ("image", "text")
    return Architecture(model_type=model_type, reads=media, makes="embeddings", towers=tuple(towers))
