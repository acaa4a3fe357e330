"""Guesses the row of a family that is missing from the table: it looks for linears around an activation.

The guess is trusted only after an exact split of every FFN has reproduced the model's own outputs
(`ffsplit.runtime.trial`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ffsplit.errors import UnsupportedModelError, explained
from ffsplit.ffn.activations import ACTIVATIONS
from ffsplit.models.architectures import ARCHITECTURES
from ffsplit.models.family import Architecture, FFNPaths, Tower
from ffsplit.models.load_options import attention_advice, attention_options

ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "act_fn")
WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "hidden_dim")
_NOT_FFN = ("attn", "attention", "cross", "router")


class _Linear(NamedTuple):
    path: str
    num_rows: int
    num_columns: int


def architecture_of(model: Any) -> Architecture:
    """The row of a model's family, or a guess from its structure. Raises UnsupportedModelError."""
    row = ARCHITECTURES.get(model.config.model_type)
    return row or row_by_structure(model, config=model.config.to_dict())


def detect_architecture(directory: Path, config: Mapping[str, Any]) -> Architecture:
    """Guess a row from the structure of a checkpoint's model; reads no weights.

    Raises UnsupportedModelError.
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
    with (
        explained(
            f"{directory}: {model_type} is not in the table, and its structure cannot be inspected",
            kind=UnsupportedModelError,
            advice=attention_advice(config),
        ),
        init_empty_weights(),
    ):
        made = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        model = transformers.AutoModel.from_config(made, **attention_options())
    return row_by_structure(model, config={**made.to_dict(), **config})


def _without_model_type(config: Mapping[str, Any]) -> str:
    """The fix for a config without model_type: add the family that its class belongs to."""
    import transformers

    classes, family = config.get("architectures"), "its family"
    if isinstance(classes, list) and classes:
        with suppress(Exception):  # the class, or a library that it needs, is missing
            family = f'"model_type": "{getattr(transformers, str(classes[0])).config_class.model_type}"'
    return f"config.json names no model_type; add {family} to it"


def row_by_structure(model: Any, *, config: Mapping[str, Any]) -> Architecture:
    """The row of a model that has one list of blocks, each with one FFN of two or three linear layers."""
    base = getattr(model, model.base_model_prefix, model)
    found: list[str] = []
    for path, blocks in base.named_modules():
        if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not path:
            continue
        linears = list(_linears(blocks[0]))
        found.append(
            f"{path}.* of {type(blocks[0]).__name__}: " + (", ".join(map(_words, linears)) or "no linear")
        )
        ffn = _ffn_of(blocks[0], linears, config)
        if ffn is not None:
            return _row(config, f"{path}.*", ffn)
    what = "; ".join(found) or "no list of blocks"
    raise UnsupportedModelError(
        f"{config.get('model_type')} is not in the table of architectures, and its structure shows no FFN "
        f"of two or three linear layers around an activation that the config names. Found {what} "
        f"(known: {', '.join(sorted(ARCHITECTURES))})"
    )


def _linears(block: nn.Module) -> Iterator[_Linear]:
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and not any(word in path.lower() for word in _NOT_FFN):
            yield _Linear(path, *module.weight.shape)


def _words(linear: _Linear) -> str:
    return f"{linear.path} [{linear.num_rows}, {linear.num_columns}]"


def _ffn_of(block: nn.Module, linears: list[_Linear], config: Mapping[str, Any]) -> FFNPaths | None:
    """The first group of linears that can be up, down and possibly gate; None if there is none."""
    for down in linears:
        pair = (down.num_columns, down.num_rows)
        ups = [each for each in linears if (each.num_rows, each.num_columns) == pair and each != down]
        if down.num_columns <= down.num_rows or len(ups) not in (1, 2):
            continue
        gates = [each for each in ups if "gate" in each.path] or ups[:1]
        gate = gates[0] if len(ups) == 2 else None
        up = next(each for each in ups if each != gate)
        widths = [name for name in WIDTH_FIELDS if config.get(name) == down.num_columns]
        shared: dict[str, Any] = {
            "up": up.path,
            "down": down.path,
            "gate": gate.path if gate else None,
            "width_field": widths[0] if widths else None,
        }
        parent = up.path.rpartition(".")[0]
        if parent and parent == down.path.rpartition(".")[0]:
            return FFNPaths(module=parent, **shared)
        activation = _activation_path(block)
        if gate is None and activation is not None:
            return FFNPaths(activation=activation, **shared)
    return None


def _activation_path(block: nn.Module) -> str | None:
    """The block's only module with "act" in its name and no weights; None if there is not exactly one."""
    names = [
        path
        for path, module in block.named_modules()
        if "act" in path.rpartition(".")[2].lower() and not list(module.parameters())
    ]
    return names[0] if len(names) == 1 else None


def _row(config: Mapping[str, Any], blocks: str, ffn: FFNPaths) -> Architecture:
    fields = [name for name in ACTIVATION_FIELDS if config.get(name) in ACTIVATIONS]
    model_type = str(config["model_type"])
    if not fields:
        raise UnsupportedModelError(
            f"{model_type} is not in the table of architectures; {blocks}: {ffn.up} and {ffn.down} look like "
            "an FFN, but the config names no known activation"
        )
    classes = config.get("architectures") or [""]
    is_causal = str(classes[0]).endswith(("ForCausalLM", "LMHeadModel")) or bool(config.get("is_decoder"))
    tower = Tower(blocks=blocks, ffns=(ffn,), activation_field=fields[0])
    return Architecture(model_type=model_type, kind="causal_lm" if is_causal else "encoder", towers=(tower,))
