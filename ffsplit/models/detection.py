"""Writes down a model's FFNs, found by structure, as a row of the table: for families that the table lacks.

What is found is trusted only after an exact split of every FFN has reproduced the model's own outputs
(`ffsplit.runtime.trial`).
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from ffsplit.compat.transformers import activation_of
from ffsplit.errors import UnsupportedModelError, explained
from ffsplit.ffn.activations import ACTIVATIONS
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.family import Architecture, FFNPaths, Medium, Tower
from ffsplit.models.inputs import MEDIUM_OF, use_of
from ffsplit.models.load_options import attention_advice, attention_options
from ffsplit.models.names import base_of, main_inputs
from ffsplit.models.probe import gating_of
from ffsplit.models.structure import (
    NOT_FFN_PATH,
    FoundFFN,
    Modules,
    block_of,
    check_nothing_is_left,
    find_in_modules,
    lists_in_words,
)
from ffsplit.models.width_fields import with_width_fields

_ACTIVATION_WORDS = re.compile(r"act|feed_forward_proj")
_SOUND_OR_PICTURE: tuple[tuple[str, Medium], ...] = (
    (r"vision|visual|image|picture|video|vit|pixel|projector|q_?former|resampler|perceiver", "image"),
    (r"audio|speech|sound|acoustic", "sound"),
)


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
    row = _row_of(directory, json.dumps(config, sort_keys=True))
    if not any(re.search(r"experts\.\d+\.w1\.", name) for name in tensor_names):
        return row

    def as_stored(tower: Tower) -> Tower:
        ffns = tuple(_with_mixtral_names(paths) if paths.experts else paths for paths in tower.ffns)
        return tower.model_copy(update={"ffns": ffns})

    return row.model_copy(update={"towers": tuple(map(as_stored, row.towers))})


def _with_mixtral_names(experts: FFNPaths) -> FFNPaths:
    """Experts that files keep one by one, by Mixtral's names: w1 for the gate, w3 for up, w2 for down."""
    path = f"{experts.module}.*"
    gate = None if experts.gate is None else f"{path}.w1"
    return experts.model_copy(update={"up": f"{path}.w3", "gate": gate, "down": f"{path}.w2"})


@lru_cache(maxsize=8)  # a worker opens one checkpoint for each of its layers
def _row_of(directory: Path, text: str) -> Architecture:
    """The row of the model in a directory, whose config is `text`."""
    import transformers

    config = json.loads(text)
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
        made, build = empty_builder(directory, config)
        model = build(made)
        row = row_by_structure(model, config={**made.to_dict(), **config})
        return with_width_fields(row, model, made, build)


def empty_builder(directory: Path, config: Mapping[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """A directory's config as transformers reads it, and what builds its class from such a config.

    The model is built on no device, without its weights.
    """
    import torch
    import transformers

    made = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    chosen = _class_of(config, made)

    def build(changed: Any) -> Any:
        with torch.device("meta"):
            return chosen._from_config(changed, **attention_options())

    return made, build


def _class_of(config: Mapping[str, Any], made: Any) -> Any:
    """The class that a config names, or its family's base model."""
    import transformers

    (name, *_) = config.get("architectures") or [""]
    named = getattr(transformers, str(name), None)
    if named is not None and isinstance(made, named.config_class or type(made)):
        return named
    return transformers.MODEL_MAPPING[type(made)]


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
    base = base_of(model)
    modules, family = Modules.of(base), str(config["model_type"])
    found = find_in_modules(modules)
    if not found:
        raise UnsupportedModelError(
            f"{family} is not in the table of architectures, and its structure shows no FFN of two or three "
            f"linear layers in its blocks. Found {lists_in_words(modules)} "
            f"(known: {', '.join(sorted(ARCHITECTURES))})"
        )
    check_nothing_is_left(modules, found, family)
    towers = tuple(_towers(base, modules, found, config))
    use = use_of(model, base, config)
    return Architecture(
        model_type=family,
        **use._asdict(),
        towers=towers,
        base="" if base is model else model.base_model_prefix,
        num_ffns=sum(each.num_ffns for each in found),
    )


# From the FFNs to the towers of a row.


def _towers(
    base: Any, modules: Modules, found: Sequence[FoundFFN], config: Mapping[str, Any]
) -> Iterator[Tower]:
    blocks: dict[str, list[tuple[str, FoundFFN]]] = defaultdict(list)
    for each in found:
        block = block_of(each.scope if each.experts else each.up, modules)
        assert block is not None
        blocks[_pattern(block, modules)].append((block, each))
    names = {pattern: _tower_name(pattern) for pattern in blocks}
    for pattern, ffns in blocks.items():
        first, one = ffns[0]
        part = _part_of_config(base, modules, first)
        reads = _reads(base, modules, first)
        activation = _activation(modules, first, one, _config_at(config, part))
        name = "" if len(blocks) == 1 else names[pattern]
        if list(names.values()).count(name) > 1:
            name = f"{name} ({pattern})"
        decodes = bool(config.get("is_encoder_decoder")) and "decoder" in pattern.split(".")
        yield Tower(
            blocks=pattern,
            ffns=_told_apart(dict.fromkeys(_paths(modules, block, each, activation) for block, each in ffns)),
            name=name,
            config=part,
            layers_field=None,
            activation_field=None,
            default_activation=activation,
            reads=reads,
            mask=None if reads != "text" else "decoder_attention_mask" if decodes else "attention_mask",
        )


def _pattern(block: str, modules: Modules) -> str:
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


def _paths(modules: Modules, block: str, ffn: FoundFFN, activation: str) -> FFNPaths:
    """Where one FFN is, and how it is computed. `activation` is its tower's."""

    def inside(path: str) -> str:
        return path.removeprefix(f"{block}.")

    is_module = ffn.experts or (ffn.is_alone and ffn.scope != block and _takes_one(modules[ffn.scope]))
    up, gate, gating = ffn.up, ffn.gate, None
    if is_module and not ffn.experts:
        paths = tuple(path.removeprefix(f"{ffn.scope}.") for path in (ffn.up, ffn.gate) if path is not None)
        down = ffn.down.removeprefix(f"{ffn.scope}.")
        gating = gating_of(modules[ffn.scope], ups=paths, down=down, fused=ffn.fused)
        if gating is not None and gating.gate is not None and gate != f"{ffn.scope}.{gating.gate}":
            assert gate is not None
            up, gate = gate, up
    function = ffn.function if gating is None else gating.function
    return FFNPaths(
        up=inside(up),
        gate=None if gate is None else inside(gate),
        down=inside(ffn.down),
        fused=ffn.fused,
        gate_half=0 if gating is None else gating.gate_half,
        interleaved=ffn.interleaved or (gating is not None and gating.interleaved),
        transposed=ffn.transposed,
        experts=ffn.experts,
        function=None if function is None or _is_same(function, activation) else function,
        module=inside(ffn.scope) if is_module else None,
        activation=None if is_module else _activation_path(modules[block], ffn, block),
        width_field=None,
        label="" if ffn.experts or ffn.scope == block else _label(inside(ffn.scope)),
    )


def _is_same(first: str, second: str) -> bool:
    """Whether two names are of one activation."""
    return first == second or ACTIVATIONS.get(first, first) is ACTIVATIONS.get(second, second)


def _takes_one(module: nn.Module) -> bool:
    """Whether a module's forward needs one argument alone. MPT's FFN adds the residual itself."""
    found = inspect.signature(module.forward).parameters.values()
    named = [each for each in found if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return sum(each.default is each.empty for each in named) == 1


def _told_apart(ffns: Iterable[FFNPaths]) -> tuple[FFNPaths, ...]:
    """The FFNs of a tower's blocks, those that share a label by the paths of their down projections."""
    found = tuple(ffns)
    labels = Counter((each.label, each.experts) for each in found)
    return tuple(
        each.model_copy(update={"label": _words(each.down.rpartition(".")[0] or each.down)})
        if labels[each.label, each.experts] > 1
        else each
        for each in found
    )


def _words(path: str) -> str:
    return path.replace(".", " ").replace("_", " ")


def _label(scope: str) -> str:
    """What distinguishes an FFN within its block: `shared expert` for mlp.shared_expert, "" for mlp."""
    usual = {"mlp", "ffn", "feed_forward", "mixer", "layer", "block_sparse_moe", "moe", "DenseReluDense"}
    parts = [part for part in scope.split(".") if part not in usual and not part.isdigit()]
    numbers = [part for part in scope.split(".") if part.isdigit()]
    return " ".join((*parts, *(numbers if parts else ()))).replace("_", " ")


def _activation_path(block: nn.Module, ffn: FoundFFN, path: str) -> str | None:
    """The module that applies an FFN's activation, relative to the block; None if not exactly one may."""
    scope = path if ffn.scope == path else ffn.scope
    near = [
        name
        for name, module in block.named_modules()
        if activation_of(module) is not None
        and f"{path}.{name}".startswith(f"{scope}.")
        and not any(NOT_FFN_PATH.search(part) for part in name.split(".")[:-1])
    ]
    return near[0] if len(near) == 1 else None


def _activation(modules: Modules, block: str, ffn: FoundFFN, config: Mapping[str, Any]) -> str:
    """The activation's name: by its module, else by the config, else the usual one."""
    for scope in (ffn.scope, block):
        names = [
            name
            for path, module in modules[scope].named_modules()
            if (name := activation_of(module)) is not None
            and not any(NOT_FFN_PATH.search(part) for part in path.split(".")[:-1])
        ]
        if names:
            return names[0]
    stated = [
        value
        for name, value in config.items()
        if isinstance(value, str) and value in ACTIVATIONS and _ACTIVATION_WORDS.search(name)
    ]
    return stated[0] if stated else "silu" if ffn.gate or ffn.fused else "gelu"


def _parents(block: str, modules: Modules) -> Iterator[tuple[str, Any]]:
    """The modules around a block, from the inside, that are models with a config of their own."""
    parts = block.split(".")
    for length in reversed(range(len(parts))):
        path = ".".join(parts[:length])
        if hasattr(modules[path], "config") and hasattr(modules[path], "main_input_name"):
            yield path, modules[path]


def _part_of_config(base: Any, modules: Modules, block: str) -> str | None:
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


def _reads(base: Any, modules: Modules, block: str) -> Medium:
    """What the tokens of a tower are made from."""
    for path, owner in _parents(block, modules):
        for pattern, reads in _SOUND_OR_PICTURE:
            if re.search(pattern, path.lower()):
                return reads
        return MEDIUM_OF.get(main_inputs(owner)[0], "text")
    return "text"
