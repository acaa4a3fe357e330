"""Finds the FFNs of a model by the structure of its modules, and writes them down as a row of the table.

For families that the table lacks. An FFN is looked for in every block of every list of blocks: two or three
linear maps from one size to another and back, or a stack of experts of that shape. What has that shape but
another purpose (attention, mixers of positions, routers, adapters, heads) is told by what transformers calls
it. A map in a block that has the shape of an FFN's, and is part of none, is an error: the model would be half
compressed. What is found is trusted only after an exact split of every FFN has reproduced the model's own
outputs (`ffsplit.runtime.trial`).
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ffsplit.compat.transformers import StackedExperts, activation_of, is_conv1d, stacked_experts
from ffsplit.errors import UnsupportedModelError, explained
from ffsplit.ffn.activations import ACTIVATIONS, activation_named, clamped_name, gated
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.family import Architecture, FFNPaths, ModelKind, Reads, Tower
from ffsplit.models.load_options import attention_advice, attention_options

_NOT_FFN_CLASS = re.compile(
    r"(Attention(V?\d|\dD)?|Attn|SelfOutput|Mixer|Mamba\d?|MambaLayer|ShortConv|DeltaNet|RecurrentBlock"
    r"|Retention|LightConv1d|Conv(olution)?Module|Router|Gate|Adapter|Pooler|Projector|Merger|Connector|Norm)$"
)
_NOT_FFN_PATH = re.compile(
    r"^(\w*attn|\w*attention|\w*_att|router|adapters?\w*|pooler|lora\w*|\w*norm\w*|bottleneck|ple_block"
    r"|per_layer_\w+|laurel|downsample|\w*bbox\w*|\w*class_embed\w*|\w*_head|projection|queries|keys_values"
    r"|modulation|patch_\w+|\w*hyper_connection|pwconv\d|pointwise_conv\d)$"
)
_MIXES_POSITIONS = re.compile(
    r"(Attention(V?\d|\dD)?|Attn|Mixer|Mamba\d?|MambaLayer|ShortConv|DeltaNet|RecurrentBlock)$"
)
_FFN_WORDS = re.compile(r"mlp|ffn|feed_?forward|intermediate|fc1", re.I)
_GATES = re.compile(r"gate|wi_0|(^|\.)w1$|fc1_g")
_WIDTH_WORDS = re.compile(r"intermediate|ffn|inner|mlp|feed_?forward|d_ff|hidden_dim|expert")
_ACTIVATION_WORDS = re.compile(r"act|feed_forward_proj")
_SOUND_OR_PICTURE: tuple[tuple[str, Reads], ...] = (
    (r"vision|visual|image|picture|video|vit|pixel", "image"),
    (r"audio|speech|sound|acoustic", "sound"),
)


class _Map(NamedTuple):
    """A linear map of a model, below its base model."""

    path: str
    num_rows: int
    num_columns: int
    transposed: bool

    @property
    def words(self) -> frozenset[str]:
        return frozenset(re.split(r"[._]", self.path))


class _Found(NamedTuple):
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
    function: str | None = None
    """The activation, where the experts' module tells it."""
    num_ffns: int = 1
    is_alone: bool = True
    """Whether the scope has no other parameters, so that it may be replaced as a whole."""


def architecture_of(model: Any) -> Architecture:
    """The row of a model's family, from the table or from its structure. Raises UnsupportedModelError."""
    row = ARCHITECTURES.get(model.config.model_type)
    return row or row_by_structure(model, config=model.config.to_dict())


def detect_architecture(
    directory: Path, config: Mapping[str, Any], *, tensor_names: Sequence[str]
) -> Architecture:
    """The row of a checkpoint's family, from the structure of its model; reads no weights.

    `tensor_names` are the names in its files. Raises UnsupportedModelError.
    """
    import transformers
    from accelerate import init_empty_weights

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        known = ", ".join(sorted(ARCHITECTURES))
        missing = f": {_without_model_type(config)}" if model_type is None else ""
        raise UnsupportedModelError(
            f"{directory}: model type {model_type!r} is not supported{missing} (known: {known})"
        )
    with explained(
        f"{directory}: {model_type} is not in the table, and its structure cannot be inspected",
        kind=UnsupportedModelError,
        advice=attention_advice(config),
    ):
        made = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        chosen = _class_of(config, made)

        def build(changed: Any) -> Any:
            with init_empty_weights():
                return chosen._from_config(changed, **attention_options())

        model = build(made)
        row = row_by_structure(model, config={**made.to_dict(), **config})
        row = _with_width_fields(row, model, made, build)
    if any(re.search(r"experts\.\d+\.w1\.", name) for name in tensor_names):
        names = ((".up_proj.", ".w3."), (".gate_proj.", ".w1."), (".down_proj.", ".w2."))
        row = row.model_copy(update={"file_names": names})
    return row


def _class_of(config: Mapping[str, Any], made: Any) -> Any:
    """The class that a config names, or its family's base model."""
    import transformers

    (name, *_) = config.get("architectures") or [""]
    return getattr(transformers, str(name), None) or transformers.MODEL_MAPPING[type(made)]


def _without_model_type(config: Mapping[str, Any]) -> str:
    """The fix for a config without model_type: add the family that its class belongs to."""
    import transformers

    classes, family = config.get("architectures"), "its family"
    if isinstance(classes, list) and classes:
        with suppress(Exception):  # the class, or a library that it needs, is missing
            family = f'"model_type": "{getattr(transformers, str(classes[0])).config_class.model_type}"'
    return f"config.json names no model_type; add {family} to it"


def row_by_structure(model: Any, *, config: Mapping[str, Any]) -> Architecture:
    """The row of a model: its towers, and the FFNs of all their blocks.

    Raises UnsupportedModelError if there is none, or if something in a block has the shape of an FFN but is
    part of none.
    """
    base = getattr(model, model.base_model_prefix, model)
    modules, family = dict(base.named_modules()), str(config["model_type"])
    found = _find(modules)
    if not found:
        raise UnsupportedModelError(
            f"{family} is not in the table of architectures, and its structure shows no FFN of two or three "
            f"linear layers in its blocks. Found {_blocks_in_words(modules)} "
            f"(known: {', '.join(sorted(ARCHITECTURES))})"
        )
    _check_nothing_is_left(modules, found, family)
    towers = tuple(_towers(base, modules, found, config))
    return Architecture(
        model_type=family,
        kind=_kind(base, config),
        towers=towers,
        base=model.base_model_prefix,
        num_ffns=sum(each.num_ffns for each in found),
    )


# The FFNs among a model's linear maps.


def _maps(modules: Mapping[str, nn.Module]) -> list[_Map]:
    """The linear maps that may belong to an FFN: those of blocks, outside attention and the like."""
    skipped: set[str] = set()
    found = []
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        is_other = _NOT_FFN_PATH.search(name) or (
            not name.isdigit() and _NOT_FFN_CLASS.search(type(module).__name__)
        )
        if path and (parent in skipped or is_other):
            skipped.add(path)
        elif isinstance(module, nn.Linear) and _block_of(path, modules) is not None:
            rows, columns = module.weight.shape
            found.append(_Map(path, rows, columns, transposed=False))
        elif is_conv1d(module) and _block_of(path, modules) is not None:
            weight: Any = module.weight
            columns, rows = weight.shape
            found.append(_Map(path, rows, columns, transposed=True))
    return found


def _block_of(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The block that a module lies in: an element of a list, with the attention beside it if there is one.

    None if no list has it. Where lists are nested, the innermost element that mixes positions is the block.
    """
    parts = path.split(".")
    elements = [
        ".".join(parts[: index + 1])
        for index, part in enumerate(parts[:-1])
        if part.isdigit() and isinstance(modules[".".join(parts[:index])], nn.ModuleList | nn.Sequential)
    ]
    for element in reversed(elements):
        if any(_MIXES_POSITIONS.search(type(each).__name__) for each in modules[element].modules()):
            return element
    return elements[0] if elements else None


def _find(modules: Mapping[str, nn.Module]) -> list[_Found]:
    """All FFNs, in the order of the modules."""
    found = list(_stacks(modules))
    inside: dict[str, list[_Map]] = defaultdict(list)
    for each in _maps(modules):
        block, parts = _block_of(each.path, modules), each.path.split(".")
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
            own = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
            others = {f"{scope}.{name}" for name, _ in modules[scope].named_parameters()} - own
            found.append(
                _Found(
                    scope,
                    up.path,
                    gate.path if gate else None,
                    down.path,
                    down.num_columns,
                    down.num_rows,
                    fused=fused,
                    transposed=up.transposed,
                    is_alone=not others,
                )
            )
    order = {path: index for index, path in enumerate(modules)}
    return sorted(found, key=lambda each: order[each.scope if each.experts else each.up])


def _stacks(modules: Mapping[str, nn.Module]) -> Iterator[_Found]:
    """The blocks' experts that transformers stacks in three-dimensional tensors."""
    for path, module in modules.items():
        form = stacked_experts(module)
        function = None if form is None else _function(module, form)
        if form is None or function is None or _block_of(path, modules) is None:
            continue
        experts: Any = module
        hidden, width = experts.down_proj.shape[:0:-1] if form.is_transposed else experts.down_proj.shape[1:]
        yield _Found(
            path,
            f"{path}.*.up_proj",
            f"{path}.*.gate_proj" if form.is_gated else None,
            f"{path}.*.down_proj",
            width,
            hidden,
            transposed=form.is_transposed,
            interleaved=form.is_interleaved,
            experts=True,
            function=function,
            num_ffns=len(experts.down_proj),
        )


def _function(experts: Any, form: StackedExperts) -> str | None:
    """The activation of a stack of experts, found by trying those known; None if it is another.

    A gating may clamp gate and up at a limit, which is one of the module's numbers, and add one to up.
    """
    if not form.is_gated:
        return activation_of(experts.act_fn)
    with torch.device("cpu"):  # a model that is loaded is built on another
        return _function_on_cpu(experts, form)


def _function_on_cpu(experts: Any, form: StackedExperts) -> str | None:
    gate, up = 8 * torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    both = torch.stack([gate, up], dim=-1).flatten(1) if form.is_interleaved else torch.cat([gate, up], dim=1)
    try:
        expected = experts._apply_gate(both)
    except Exception:  # a family's own code, of another form
        return None
    limits = {
        float(value) for value in vars(experts).values() if isinstance(value, int | float) and value > 1
    }
    names = [*ACTIVATIONS]
    names += [
        clamped_name(name, limit=limit, shift=shift)
        for name in ("silu", "quick_gelu", "gelu", "gelu_pytorch_tanh", "relu")
        for limit in sorted(limits)
        for shift in (0.0, 1.0)
    ]
    for name in names:
        if torch.allclose(gated(activation_named(name), gate, up), expected, rtol=1e-5, atol=1e-5):
            return name
    return None


_Group = tuple[_Map, _Map | None, _Map, bool]


def _group(maps: Sequence[_Map], scope: str, modules: Mapping[str, nn.Module]) -> _Group | None:
    """Up, gate, down, and whether up holds the gate too, among a module's maps; None if nothing fits.

    Where several fit, those whose names have most in common.
    """
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


def _check_nothing_is_left(modules: Mapping[str, nn.Module], found: Sequence[_Found], family: str) -> None:
    """Raise UnsupportedModelError if a block has a weight of an FFN's shape that is part of none found.

    That is a matrix, or a stack of matrices, that widens the hidden size or narrows to it.
    """
    hidden = {_block_of(each.up, modules): each.hidden_size for each in found}
    taken = {path for each in found for path in (each.up, each.gate, each.down)}
    stacks = {each.scope for each in found if each.experts}
    left: dict[str, str] = {}
    for each in _maps(modules):
        size = hidden.get(_block_of(each.path, modules))
        if size in (each.num_rows, each.num_columns) and max(each[1:3]) > size and each.path not in taken:
            left[_starred(each.path)] = f"[{each.num_rows}, {each.num_columns}]"
    for path, module in modules.items():
        is_other = (
            isinstance(module, _ConvNd)
            or "parametrizations" in path
            or _NOT_FFN_CLASS.search(type(module).__name__)
        )
        if path in stacks or _block_of(path, modules) is None or is_other:
            continue
        sizes = set(hidden.values())
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and sizes & set(weight.shape[1:]) and min(weight.shape[1:]) > 1:
                left[_starred(f"{path}.{name}")] = str(list(weight.shape))
    for ffn in found:
        parts = ffn.scope.split(".")
        if "experts" in parts[:-1] and not ffn.experts:  # run by other code than the usual, for some tokens
            left[_starred(ffn.down)] = f"[{ffn.hidden_size}, {ffn.width}]"
        between = [
            name for name, weight in modules[ffn.scope].named_parameters() if _is_norm_of(name, weight, ffn)
        ]
        if between and not ffn.is_alone and not ffn.experts:
            left[_starred(f"{ffn.scope}.{between[0]}")] = f"[{ffn.width}]"
    if left:
        words = ", ".join(f"{name} {shape}" for name, shape in sorted(left.items())[:4])
        raise UnsupportedModelError(
            f"{family} is not in the table of architectures, and its blocks have weights that may belong to "
            f"an FFN, in a form that FFSplit does not know: {words}; it would be compressed in part only"
        )


def _starred(path: str) -> str:
    """A path with `*` for its numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _is_norm_of(name: str, weight: nn.Parameter, ffn: _Found) -> bool:
    """Whether a parameter in an FFN's scope is a norm over its neurons, between activation and down."""
    return weight.dim() == 1 and len(weight) == ffn.width != ffn.hidden_size and "norm" in name


def _blocks_in_words(modules: Mapping[str, nn.Module]) -> str:
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


# From the FFNs to the towers of a row.


def _towers(
    base: Any, modules: Mapping[str, nn.Module], found: Sequence[_Found], config: Mapping[str, Any]
) -> Iterator[Tower]:
    blocks: dict[str, list[tuple[str, _Found]]] = defaultdict(list)
    for each in found:
        block = _block_of(each.scope if each.experts else each.up, modules)
        assert block is not None
        blocks[_pattern(block, modules)].append((block, each))
    for pattern, ffns in blocks.items():
        first, one = ffns[0]
        part = _part_of_config(base, modules, first)
        reads = _reads(base, modules, first)
        activation = _activation(modules, first, one, _config_at(config, part))
        name = "" if len(blocks) == 1 else _tower_name(pattern)
        decodes = bool(config.get("is_encoder_decoder")) and "decoder" in pattern.split(".")
        yield Tower(
            blocks=pattern,
            ffns=tuple(dict.fromkeys(_paths(modules, block, each) for block, each in ffns)),
            name=name,
            config=part,
            layers_field=None,
            activation_field=None,
            default_activation=activation,
            reads=reads,
            mask=None if reads != "text" else "decoder_attention_mask" if decodes else "attention_mask",
        )


def _pattern(block: str, modules: Mapping[str, nn.Module]) -> str:
    """A block's path with `*` for its index, and for those of the lists around its list."""
    parts = block.split(".")
    return ".".join(
        "*" if part.isdigit() and isinstance(modules[".".join(parts[:index])], nn.ModuleList | nn.Sequential)
        else part
        for index, part in enumerate(parts)
    )  # fmt: skip


def _tower_name(pattern: str) -> str:
    """`decoder` for decoder.layers.*, `vision tower encoder` for vision_tower.encoder.layers.*."""
    parts = [part for part in pattern.split(".") if part != "*"]
    return " ".join(parts[:-1] or parts).replace("_", " ")


def _paths(modules: Mapping[str, nn.Module], block: str, ffn: _Found) -> FFNPaths:
    def inside(path: str | None) -> str | None:
        return None if path is None else path.removeprefix(f"{block}.")

    is_module = ffn.experts or (ffn.is_alone and ffn.scope != block)
    up, down = inside(ffn.up), inside(ffn.down)
    assert up is not None and down is not None
    label = ""
    if not ffn.experts and ffn.scope != block:
        label = inside(ffn.scope) or ""
    return FFNPaths(
        up=up,
        gate=inside(ffn.gate),
        down=down,
        fused=ffn.fused,
        transposed=ffn.transposed,
        interleaved=ffn.interleaved,
        experts=ffn.experts,
        function=ffn.function,
        module=inside(ffn.scope) if is_module else None,
        activation=None if is_module else _activation_path(modules[block], ffn, block),
        width_field=None,
        label=_label(label),
    )


def _label(scope: str) -> str:
    """What distinguishes an FFN within its block: `shared expert` for mlp.shared_expert, "" for mlp."""
    usual = {"mlp", "ffn", "feed_forward", "mixer", "layer", "block_sparse_moe", "moe", "DenseReluDense"}
    parts = [part for part in scope.split(".") if part not in usual and not part.isdigit()]
    numbers = [part for part in scope.split(".") if part.isdigit()]
    return " ".join((*parts, *(numbers if parts else ()))).replace("_", " ")


def _activation_path(block: nn.Module, ffn: _Found, path: str) -> str | None:
    """The module that applies an FFN's activation, relative to the block; None if not exactly one may."""
    scope = path if ffn.scope == path else ffn.scope
    near = [
        name
        for name, module in block.named_modules()
        if activation_of(module) is not None
        and f"{path}.{name}".startswith(f"{scope}.")
        and not any(_NOT_FFN_PATH.search(part) for part in name.split(".")[:-1])
    ]
    return near[0] if len(near) == 1 else None


def _activation(modules: Mapping[str, nn.Module], block: str, ffn: _Found, config: Mapping[str, Any]) -> str:
    """The activation's name: by its module, else by the config, else the usual one."""
    for scope in (ffn.scope, block):
        names = [
            name
            for path, module in modules[scope].named_modules()
            if (name := activation_of(module)) is not None
            and not any(_NOT_FFN_PATH.search(part) for part in path.split(".")[:-1])
        ]
        if names:
            return names[0]
    stated = [
        value
        for name, value in config.items()
        if isinstance(value, str) and value in ACTIVATIONS and _ACTIVATION_WORDS.search(name)
    ]
    return stated[0] if stated else "silu" if ffn.gate or ffn.fused else "gelu"


def _parents(block: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """The modules around a block, from the inside, that are models with a config of their own."""
    parts = block.split(".")
    for length in reversed(range(len(parts))):
        path = ".".join(parts[:length])
        if hasattr(modules[path], "config") and hasattr(modules[path], "main_input_name"):
            yield path, modules[path]


def _part_of_config(base: Any, modules: Mapping[str, nn.Module], block: str) -> str | None:
    """The part of the config, as a dotted path, that the model around a block is made from; None: all."""
    if not hasattr(base, "config"):
        return None
    parts = dict(_config_parts(base.config))
    for _, owner in _parents(block, modules):
        if owner.config is base.config:
            return None
        same = [name for name, part in parts.items() if part is owner.config]
        alike = [name for name, part in parts.items() if type(part) is type(owner.config)]
        if len(found := same or alike) == 1:
            return found[0]
    return None


def _config_parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield f"{prefix}{name}", value
            yield from _config_parts(value, f"{prefix}{name}.")


def _config_at(config: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    for name in part.split(".") if part else ():
        config = config.get(name) or {}
    return config


def _reads(base: Any, modules: Mapping[str, nn.Module], block: str) -> Reads:
    """What the tokens of a tower are made from."""
    for path, owner in _parents(block, modules):
        words = f"{type(owner).__name__} {path}".lower()
        for pattern, reads in _SOUND_OR_PICTURE:
            if path and re.search(pattern, words):
                return reads
        if owner.main_input_name == "pixel_values":
            return "image"
        if owner.main_input_name in ("input_features", "input_values"):
            return "sound"
        return "text"
    return "text"


_MAIN_INPUTS: dict[str, Reads] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_values": "sound",
    "input_features": "sound",
}


def _kind(base: Any, config: Mapping[str, Any]) -> ModelKind:
    """What a model reads, and which of its outputs are compared."""
    from transformers.models.auto import modeling_auto as auto

    reads = _MAIN_INPUTS.get(getattr(base, "main_input_name", "input_ids"))
    family, (name, *_) = str(config["model_type"]), config.get("architectures") or [""]
    if config.get("is_encoder_decoder") and "decoder_input_ids" in inspect.signature(base.forward).parameters:
        kind = {"text": "seq2seq", "sound": "speech"}.get(reads or "")
    elif hasattr(base, "get_text_features") and hasattr(base, "get_image_features"):
        kind = "image_text"
    elif reads != "text":
        kind = {"image": "image", "sound": "audio"}.get(reads or "")
    else:
        named = str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        causal = family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
            family in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        )
        masked = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        kind = "causal_lm" if named or config.get("is_decoder") or (causal and not masked) else "encoder"
    if kind is None:
        made = f"makes text of {base.main_input_name}" if reads else f"reads {base.main_input_name}"
        raise UnsupportedModelError(
            f"{family} is not in the table of architectures, and it {made}: FFSplit calibrates models that "
            "read text, pictures or sound, and those that make text of text or of sound"
        )
    return cast(ModelKind, kind)


# Which field of a config states an FFN's width: found by changing it and building the model again.


def _with_width_fields(
    row: Architecture, model: Any, config: Any, build: Callable[[Any], Any]
) -> Architecture:
    """The row with the fields that state a width, and nothing but widths of one kind of FFN."""
    before = _shapes_and_widths(model)
    fields: dict[tuple[str, str | None], str] = {}
    for part in dict.fromkeys(tower.config for tower in row.towers):
        for field in _candidates(config, part, widths=set(before.widths.values())):
            changed = type(config).from_dict(config.to_dict())
            owner = _at(changed, part)
            value = 2 * (getattr(owner, field) or max(before.widths.values()))
            try:
                setattr(owner, field, value)
                after = _shapes_and_widths(build(changed))
            except Exception:  # the value does not fit the others
                continue
            moved = {name for name, width in before.widths.items() if after.widths.get(name) != width}
            others = {
                name
                for name in before.shapes.keys() | after.shapes.keys()
                if before.shapes.get(name) != after.shapes.get(name)
            }
            if not others and all(after.widths.get(name) == value for name in moved):
                fields |= {(name, part): field for name in moved}
    towers = []
    for tower in row.towers:
        ffns = []
        for paths in tower.ffns:
            down = re.compile(_as_regex(tower, paths))
            named = [name for name in before.widths if down.fullmatch(name)]
            stated = {fields.get((name, tower.config)) for name in named}
            width_field = stated.pop() if len(stated) == 1 else None
            ffns.append(paths.model_copy(update={"width_field": width_field}))
        towers.append(tower.model_copy(update={"ffns": tuple(ffns)}))
    return row.model_copy(update={"towers": tuple(towers)})


class _Sizes(NamedTuple):
    shapes: dict[str, torch.Size]
    """Of every parameter outside the FFNs."""
    widths: dict[str, int]
    """Of every FFN, by the path of its down projection, or of its experts."""


def _shapes_and_widths(model: Any) -> _Sizes:
    base = getattr(model, model.base_model_prefix, model)
    found = _find(dict(base.named_modules()))
    inside = tuple(
        f"{path}."
        for each in found
        for path in ((each.scope,) if each.experts else (each.up, each.gate, each.down))
        if path is not None
    )
    shapes = {name: value.shape for name, value in base.named_parameters() if not name.startswith(inside)}
    return _Sizes(shapes, {each.scope if each.experts else each.down: each.width for each in found})


def _candidates(config: Any, part: str | None, *, widths: set[int]) -> list[str]:
    """Fields of a part of a config that may state a width: those of its value, or without one."""
    fields = vars(_at(config, part))
    return [
        name
        for name, value in fields.items()
        if _WIDTH_WORDS.search(name)
        and (value is None or (isinstance(value, int) and not isinstance(value, bool) and value in widths))
    ]


def _at(config: Any, part: str | None) -> Any:
    for name in part.split(".") if part else ():
        config = getattr(config, name)
    return config


def _as_regex(tower: Tower, paths: FFNPaths) -> str:
    path = (paths.module if paths.experts else paths.down) or ""
    return re.escape(f"{tower.blocks}.{path}" if path else tower.blocks).replace(r"\*", r"\d+")
