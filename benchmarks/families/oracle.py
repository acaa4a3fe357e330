"""Which parameters of a model belong to feed-forward networks, told without the product.

An FFN is two or three linear maps from the hidden size to a width and back, with an elementwise activation
between them, inside the repeated blocks of a tower. It is found by what authors call its parts: a pair of
names below one module, whose shapes fit. Attention, embeddings, heads, convolutions, state spaces, routers,
adapters, poolers and multimodal projectors are none, though many have the shape of one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.families.tables import FFNS, NOT_FFNS, OPTIONAL_FFNS

PAIRS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    (
        "down_proj",
        (("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",), ("up_gate_proj",), ("gate_proj",)),
    ),
    ("fc2", (("fc1_g", "fc1_x"), ("fc1",), ("fc1.proj",), ("fc11", "fc12"))),
    ("linear_fc2", (("linear_fc1",),)),
    ("output.dense", (("intermediate.dense",),)),
    ("output_query.dense", (("intermediate_query.dense",),)),
    ("lang_output.dense", (("lang_inter.dense",),)),
    ("visn_output.dense", (("visn_inter.dense",),)),
    ("layout_output.dense", (("layout_intermediate.dense",),)),
    ("output_dense", (("intermediate_dense",),)),
    ("linear2", (("linear1",),)),
    ("linear_2", (("linear_1",),)),
    ("dense_4h_to_h", (("dense_h_to_4h",),)),
    ("c_proj", (("c_fc",), ("w1", "w2"), ("c_fc_0", "c_fc_1"))),
    ("proj_out", (("proj_in",),)),
    ("wo", (("wi_0", "wi_1"), ("wi",))),
    ("Wo", (("Wi",),)),
    ("lin2", (("lin1",),)),
    ("w2", (("w1", "w3"), ("w1", "v1"), ("w1",))),
    ("w_out", (("w_in.w_0", "w_in.w_1"), ("w_in",))),
    ("ffn_output", (("ffn",),)),
    ("mlp.out_proj", (("mlp.in_proj",),)),
    ("feed_forward.output", (("feed_forward.intermediate",),)),
    ("dense2", (("dense1",),)),
    ("ff.layer_2", (("ff.layer_1",),)),
    ("fc_out", (("fc_in",),)),
    ("proj_down", (("proj_up_gate", "proj_up"),)),
    ("output_linear", (("input_linear",),)),
    ("output.dense.dense", (("intermediate.dense.dense",),)),
    ("output_layer", (("hidden_layer",), ("input_layer",))),
    ("weights_out", (("weights_in",), ("weights_in_gate", "weights_in"))),
    ("linear_down.linear", (("linear_up.linear",),)),
    ("fc2.linear", (("fc1.linear",),)),
    ("ffw_layer_2.linear", (("ffw_layer_1.linear",),)),
    ("ffw_layer_2", (("ffw_layer_1",),)),
    ("down_proj.linear", (("gate_proj.linear", "up_proj.linear"), ("up_proj.linear",))),
    ("output.dense", (("dense.dense",),)),
    ("pwconv2", (("pwconv1",),)),
    ("pointwise_conv2", (("pointwise_conv1",),)),
    ("feed_forward.value", (("feed_forward.key",),)),
)
"""The down projection, and what up, or gate and up, may be called beside it."""
NOT_IN = re.compile(
    r"(?:^|[._])(?:self_attn|self_attention|attn|attention|cross_attn|router|merger|mergers|projector|"
    r"multi_modal_projector|connector|pooler|head|heads|adapter|adapters|aligner|bbox_embed|class_embed|"
    r"hypernetworks_mlps|lm_head|classifier|predictions|modality_projection|projection)(?:[._]|$)"
)
"""Modules whose linear maps are no FFN, by a word in their path."""
IN_BLOCK = re.compile(r"\.\d+(?:\.|$)")


class Found(NamedTuple):
    """One FFN of the oracle; one of a stack of experts each."""

    down: str
    width: int
    hidden_size: int
    elements: int
    is_expert: bool
    optional: bool
    digest: str
    """Of the down projection as [hidden size, width] in float32."""
    expert: int | None = None
    """Its index in a stack."""
    transposed: bool = False
    """Whether its parameter is [width, hidden size]."""
    flat: bool = False
    """Whether the experts' matrices are one below the other: [experts * width, hidden size]."""

    def matrix(self, model: nn.Module) -> Tensor:
        """A view of its down projection in a model, as [hidden size, width]."""
        found = model.get_parameter(self.down)
        if self.flat:
            found = found.view(-1, self.width, self.hidden_size)
        found = found if self.expert is None else found[self.expert]
        return found.T if self.transposed else found


def ffns_of(model: nn.Module, model_type: str) -> list[Found]:
    """The FFNs of a model, in the order of its parameters; tied ones once."""
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    found: dict[str, Found] = {}
    for name in parameters:
        for each in _at(name, parameters, modules):
            label = _label(model_type, each.down)
            if label != "none":
                found.setdefault(f"{each.down}|{each.expert}", each._replace(optional=label == "optional"))
    return list(found.values())


def _label(model_type: str, down: str) -> str:
    """ffn, optional or none, for the down projection of what has an FFN's shape."""
    model_type = model_type.partition("/")[0]
    for table, label in ((NOT_FFNS, "none"), (OPTIONAL_FFNS, "optional"), (FFNS, "ffn")):
        for pattern in (*table.get(model_type, ()), *table.get("*", ())):
            if re.search(pattern, down):
                return label
    if NOT_IN.search(down.rpartition(".")[0]):
        return "none"
    return "ffn" if IN_BLOCK.search(down) else "optional"


def _at(name: str, parameters: dict[str, Tensor], modules: dict[str, nn.Module]) -> Iterator[Found]:
    """The FFNs whose down projection has this name."""
    weight = parameters[name]
    if weight.dim() not in (2, 3):
        return
    path = name.removesuffix(".weight")
    suffix = ".weight" if name.endswith(".weight") else ""
    for down, ups in PAIRS:
        if path != down and not path.endswith(f".{down}"):
            continue
        scope = path.removesuffix(down)
        for each in ups:
            names = [f"{scope}{up}{suffix}" for up in each]
            if all(up in parameters for up in names):
                found = list(_fit([parameters[up] for up in names], weight, name, modules.get(path)))
                if found:
                    yield from found
                    return
    if path not in modules and weight.dim() == 2:
        yield from _below_each_other(name, parameters, modules)
        return
    yield from _in_sequence(name, parameters, modules)


def _below_each_other(
    name: str, parameters: dict[str, Tensor], modules: dict[str, nn.Module]
) -> Iterator[Found]:
    """DBRX's experts: w1 and v1 are gate and up, w2 is down, each [experts * width, hidden size]."""
    scope, _, own = name.rpartition(".")
    names = [f"{scope}.{each}" for each in ("w1", "v1", "w2")]
    holder = modules.get(scope.rpartition(".")[0])
    number = getattr(holder, "num_experts", None)
    if own != "w2" or not number or not all(each in parameters for each in names):
        return
    first = parameters[name]
    stack = first.detach().view(number, -1, first.shape[-1])
    for expert, matrix in enumerate(stack):
        width, hidden = matrix.shape
        yield Found(
            name,
            width,
            hidden,
            3 * matrix.numel(),
            is_expert=True,
            optional=False,
            digest=digest(matrix.T),
            expert=expert,
            transposed=True,
            flat=True,
        )


def _in_sequence(name: str, parameters: dict[str, Tensor], modules: dict[str, nn.Module]) -> Iterator[Found]:
    """A Sequential, or a module list, of linear, activation, (dropout,) linear."""
    match = re.fullmatch(r"(.*\.|)(\d+)\.weight", name)
    holder = modules.get(match[1].removesuffix(".")) if match else None
    if match is None or not isinstance(holder, nn.Sequential | nn.ModuleList):
        return
    scope, number = match[1], int(match[2])
    linears = [index for index, each in enumerate(holder) if isinstance(each, nn.Linear)]
    if linears[1:] != [number]:
        return
    up = f"{scope}{linears[0]}.weight"
    if up in parameters:
        yield from _fit([parameters[up]], parameters[name], name, modules[f"{scope}{number}"])


def _fit(ups: list[Tensor], down: Tensor, name: str, module: nn.Module | None) -> Iterator[Found]:
    """The FFN of these matrices, or one for each expert of a stack; nothing if the shapes do not fit."""
    if any(up.dim() != down.dim() for up in ups):
        return
    first, second = down.shape[-2:]
    transposed_first = type(module).__name__ == "Conv1D"
    for transposed in (transposed_first, *([not transposed_first] if down.dim() == 3 else [])):
        width, hidden = (first, second) if transposed else (second, first)
        rows = [up.shape[-1 if transposed else -2] for up in ups]
        columns = {up.shape[-2 if transposed else -1] for up in ups}
        fused = len(ups) == 1 and rows == [2 * width]
        if columns != {hidden} or not (fused or set(rows) == {width}) or width == hidden == 1:
            continue
        matrices = down.detach().transpose(-1, -2) if transposed else down.detach()
        stack = matrices if down.dim() == 3 else matrices[None]
        elements = (sum(up.numel() for up in ups) + down.numel()) // len(stack)
        is_expert = down.dim() == 3 or bool(re.search(r"experts\.\d+\.", name))
        for index, matrix in enumerate(stack):
            expert = index if down.dim() == 3 else None
            found = Found(name, width, hidden, elements, is_expert, False, digest(matrix))
            yield found._replace(expert=expert, transposed=transposed)
        return


def digest(matrix: Tensor) -> str:
    """Of a matrix's float32 values."""
    return hashlib.sha256(matrix.to(torch.float32).contiguous().numpy().tobytes()).hexdigest()[:16]


def unexplained(model: nn.Module, found: list[Found]) -> list[str]:
    """Linear maps that expand or contract the hidden size and are in no FFN found: to look at by hand."""
    downs = {each.down for each in found}
    scopes = {name.rsplit(".", 2)[0] for name in downs} | {name.rsplit(".", 3)[0] for name in downs}
    names: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        short = re.sub(r"\.\d+(?=\.)", ".*", name)
        if parameter.dim() not in (2, 3) or parameter.shape[-1] == parameter.shape[-2]:
            continue
        if NOT_IN.search(name) or "embed" in name or not IN_BLOCK.search(name) or name in downs:
            continue
        if any(name.startswith(f"{scope}.") for scope in scopes):
            continue
        names[short] = tuple(parameter.shape)
    return [f"{name} {list(shape)}" for name, shape in names.items()]
