"""Writes down a model's FFNs, found by structure, as a row of the table: for families that the table lacks.

What is found is trusted only after an exact split of every FFN has reproduced the model's own outputs
(`ffsplit.runtime.trial`).
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ffsplit.models.inputs import use_of
from ffsplit.models.load_options import attention_advice, attention_options
from ffsplit.models.modality import modality_named, parents_of, reads_of
from ffsplit.models.names import base_of
from ffsplit.models.probe import function_between, gating_of
from ffsplit.models.structure import (
    NOT_FFN_PATH,
    FoundFFN,
    Modules,
    block_of,
    check_nothing_is_left,
    find_in_modules,
    lists_in_words,
    with_experts_joined,
)
from ffsplit.models.width_fields import with_width_fields

_ACTIVATION_WORDS = re.compile(r"act|feed_forward_proj")


def architecture_of(model: Any) -> Architecture:
    """The row of a model's family, from the table or from its structure. Raises UnsupportedModelError."""
    row = ARCHITECTURES.get(model.config.model_type)
    return row or row_by_structure(model, config=model.config.to_dict())


def detect_architecture(directory: Path, config: Mapping[str, Any]) -> Architecture:
    """The row of a checkpoint's family, from the structure of its model; reads no weights.

    Raises UnsupportedModelError.
    """
    return _row_of(directory, json.dumps(config, sort_keys=True))


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
    """The class that a config names, or its family's base model.

    A family without modelling code of its own names a class of another: InternLM3 those of Llama.
    """
    import transformers

    (name, *_) = config.get("architectures") or [""]
    named = getattr(transformers, str(name), None)
    base = transformers.MODEL_MAPPING.get(type(made), None)
    if named is not None and (
        base is None
        or isinstance(made, named.config_class or type(made))
        or named.__module__ == getattr(base, "__module__", None)
    ):
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
            f"linear layers in its blocks. Found {lists_in_words(modules)}"
        )
    check_nothing_is_left(modules, found, family)
    found, twins = _without_twins(model, base, found)
    found = with_experts_joined(found, modules)
    towers = tuple(_towers(model, modules, found, config))
    use = use_of(model, base, config)
    return Architecture(
        model_type=family,
        **use._asdict(),
        towers=towers,
        base="" if base is model else model.base_model_prefix,
        twins=_blocks_of(twins, modules, family),
        num_ffns=sum(each.num_ffns for each in found),
    )


def _without_twins(
    model: Any, base: nn.Module, found: Sequence[FoundFFN]
) -> tuple[list[FoundFFN], list[tuple[FoundFFN, FoundFFN]]]:
    """The FFNs, tied ones once, and pairs of these and another of the same weights. Zamba has such blocks."""
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    by_name = {
        f"{prefix}{f'{each.scope}.{each.stack.down}' if each.stack else f'{each.down}.weight'}": each
        for each in found
    }
    pairs = [
        (by_name[tied[name]], each)
        for name, each in by_name.items()
        if name in tied and tied[name] in by_name
    ]
    twins = {each.down for _, each in pairs}
    return [
        each._replace(has_twins=any(one.down == each.down for one, _ in pairs))
        for each in found
        if each.down not in twins
    ], pairs


def _blocks_of(
    twins: Sequence[tuple[FoundFFN, FoundFFN]], modules: Modules, family: str
) -> tuple[tuple[str, str], ...]:
    """The pairs of blocks that run the same FFN. Raises UnsupportedModelError if two towers share one."""

    def block(ffn: FoundFFN) -> str:
        return block_of(ffn.scope if ffn.stack else ffn.up, modules) or ""

    pairs = tuple(dict.fromkeys((block(one), block(other)) for one, other in twins))
    for first, other in pairs:
        if _pattern(first, modules) != _pattern(other, modules):
            raise UnsupportedModelError(
                f"{family} is not in the table of architectures, and {first} and {other} run the same FFN: "
                "FFSplit does not calibrate an FFN that several towers share"
            )
    return pairs


# From the FFNs to the towers of a row.


def _towers(
    model: Any, modules: Modules, found: Sequence[FoundFFN], config: Mapping[str, Any]
) -> Iterator[Tower]:
    blocks: dict[str, list[tuple[str, FoundFFN]]] = defaultdict(list)
    for each in found:
        block = block_of(each.scope if each.experts else each.up, modules)
        assert block is not None
        blocks[_pattern(block, modules)].append((block, each))
    names = {pattern: _tower_name(pattern) for pattern in blocks}
    for pattern, ffns in blocks.items():
        first, one = ffns[0]
        part = _part_of_config(model, modules, first)
        reads = reads_of(modules, first)
        activation = _activation(modules, first, one, _config_at(config, part))
        paths: dict[FFNPaths, list[str]] = defaultdict(list)
        for block, each in ffns:
            paths[_paths(modules, block, each, activation, reads)].append(block)
        name = "" if len(blocks) == 1 else names[pattern]
        if list(names.values()).count(name) > 1:
            name = f"{name} ({pattern})"
        decodes = bool(config.get("is_encoder_decoder")) and "decoder" in pattern.split(".")
        yield Tower(
            blocks=pattern,
            ffns=_told_apart(paths),
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


def _paths(modules: Modules, block: str, ffn: FoundFFN, activation: str, reads: Medium) -> FFNPaths:
    """Where one FFN is, and how it is computed. `activation` and `reads` are its tower's."""

    def inside(path: str) -> str:
        if ffn.starred is not None:
            path = re.sub(rf"^{re.escape(ffn.scope)}(?=\.|$)", ffn.starred, path)
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
    is_module = is_module and not (gating is not None and gating.adds_input)
    function = ffn.function if gating is None else gating.function
    path = None if ffn.experts else _activation_path(modules[block], ffn, block)
    is_odd = ffn.fused or ffn.transposed or ffn.scope == block
    if path is None and gate is None and not (is_module or ffn.experts or is_odd):
        first, last = (each.removeprefix(f"{ffn.scope}.") for each in (ffn.up, ffn.down))
        function = function_between(modules[ffn.scope], up=first, down=last)
    trained = path is not None and any(True for _ in modules[block].get_submodule(path).parameters())
    return FFNPaths(
        up=inside(up),
        gate=None if gate is None else inside(gate),
        down=inside(ffn.down),
        fused=ffn.fused,
        gate_half=ffn.gate_half if gating is None else gating.gate_half,
        interleaved=ffn.interleaved or (gating is not None and gating.interleaved),
        transposed=ffn.transposed,
        experts=ffn.experts or ffn.starred is not None,
        stack=ffn.stack,
        narrow_only=ffn.narrow_only or ffn.has_twins or bool(ffn.adapters),
        adapters=re.sub(r"\.\d+(?=\.)", ".*", inside(ffn.adapters[0])) if ffn.adapters else None,
        function=None if function is None or _is_same(function, activation) else function,
        module=inside(ffn.scope) if is_module else None,
        activation=path if trained or not is_module else None,
        trained=trained,
        per_neuron=tuple(map(inside, ffn.per_neuron)),
        width_field=None,
        reads=modality_named(inside(ffn.scope)) if reads == "text" and ffn.scope != block else None,
        label="" if ffn.experts or ffn.starred or ffn.scope == block else _label(inside(ffn.scope)),
    )


def _is_same(first: str, second: str) -> bool:
    """Whether two names are of one activation."""
    return first == second or ACTIVATIONS.get(first, first) is ACTIVATIONS.get(second, second)


def _takes_one(module: nn.Module) -> bool:
    """Whether a module's forward needs one argument alone. MPT's FFN adds the residual itself.

    Lists and dictionaries of modules are not called: their model calls what is in them.
    """
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    found = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty and each.kind != each.VAR_KEYWORD for each in found) == 1


def _told_apart(ffns: Mapping[FFNPaths, Sequence[str]]) -> tuple[FFNPaths, ...]:
    """The FFNs of a tower, with the blocks that have each.

    Those of one block that share a label are told apart by the paths of their down projections, and those
    at one place of different blocks by their blocks: some may have another function.
    """
    labels = Counter((label, experts) for label, experts, _ in {(e.label, e.experts, e.down) for e in ffns})
    places = Counter(each.down for each in ffns)
    found = []
    for each, blocks in ffns.items():
        label = _words(_place(each)) if labels[each.label, each.experts] > 1 else each.label
        at_blocks = tuple(blocks) if places[each.down] > 1 else ()
        found.append(each.model_copy(update={"label": label, "blocks": at_blocks}))
    return tuple(found)


def _place(ffn: FFNPaths) -> str:
    """The path that tells an FFN apart: without the name of its down projection, or of a stack's module."""
    if ffn.experts and ffn.module is not None:
        return ffn.module.removesuffix(".experts")
    return ffn.down.rpartition(".")[0] or ffn.down


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


def _part_of_config(model: Any, modules: Modules, block: str) -> str | None:
    """The part of a model's config, as a dotted path, that the model around a block is made from; None: all.

    The base model's config may itself be a part.
    """
    if not hasattr(model, "config"):
        return None
    parts = dict(_config_parts(model.config))
    for _, owner in parents_of(block, modules):
        if owner.config is model.config:
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
