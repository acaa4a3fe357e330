"""An artifact as one ONNX file with dynamic axes; int8 weights stay int8, multiplied by MatMulInteger."""

from __future__ import annotations

import inspect
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.models.load import decodes, load_whole_model, quiet_transformers
from ffsplit.runtime.integer_map import IntegerMap

INSTALL = "pip install 'ffsplit[onnx]'"
FILE_NAME = "model.onnx"
OPSET = 18
EXAMPLE, EXAMPLE_PAST = torch.arange(5, 19).reshape(2, 7), 3
Cache = list[tuple[Tensor, Tensor]]


@torch.library.custom_op("ffsplit::int8_product", mutates_args=())
def int8_product(x: Tensor, weight_KN: Tensor, scale: Tensor, per_token: bool) -> Tensor:
    """x times a matrix of int8 with a scale a column: a marker that becomes ONNX's own operators."""
    return x @ (weight_KN.to(x.dtype) * scale)


@int8_product.register_fake
def _(x: Tensor, weight_KN: Tensor, scale: Tensor, per_token: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_KN.shape[1])


class _Int8Product(nn.Module):
    """What an IntegerMap is while it is exported."""

    def __init__(self, linear: IntegerMap) -> None:
        super().__init__()
        weight, scale = linear.tensors().values()
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("scale", scale[:, 0].float())
        self.bias, self.activation, self.per_token = linear.bias, linear.activation, linear.per_token

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        y: Tensor = int8_product(x, self.weight, self.scale, self.per_token)
        added = self.bias if plus is None else plus
        y = y if added is None else y + added
        return y if self.activation is None else self.activation(y)


class _Encoder(nn.Module):
    """A model with two inputs and one output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)[0]
        return result


class _Decoder(nn.Module):
    """A causal model as a function of new tokens, and of the keys and values of those before."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """`attention_mask` is as long as past and new tokens together; padding on the left is no position."""
        options = {}
        if self.takes_positions:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(past),
            use_cache=True,
            return_dict=True,
            **options,
        )
        return result.logits, [(layer.keys, layer.values) for layer in result.past_key_values.layers]


def export_onnx(directory: Path, target: Path) -> Path:
    """Write a checkpoint's model to `target`, in float32 but for its integers, and return that file.

    Inputs are `input_ids` and `attention_mask` [batch, tokens]; the output is `logits`, or
    `last_hidden_state` of a model without a head. Causal models with a head also take
    `past_key_values.N.key` and `.value` [batch, heads, past tokens, size], of no tokens to begin with, and
    give `present.N.key` and `.value`. Raises ConfigError where the extra is missing or the model has what
    the file could not hold.
    """
    translations = _translations()
    config = json.loads((directory / "config.json").read_text("utf-8"))
    class_name = (config.get("architectures") or [""])[0]
    model = load_whole_model(directory, class_name, dtype=torch.float32)
    _replace_integer_maps(model)
    with quiet_transformers(), ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        try:
            options = _decoder_options(model) if decodes(model) else _encoder_options(model)
            program = torch.onnx.export(
                **options,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translations,
                verbose=False,
            )
        except Exception as error:  # the exporter raises types of many libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FFSplitError(f"{class_name} could not be exported to ONNX: {reason}") from error
    assert program is not None
    _drop_source_paths(program.model)
    program.save(str(target))
    return target


def _drop_source_paths(model: Any) -> None:
    """Take out where in whose files each node was traced: paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for name in [name for name in node.metadata_props if "stack_trace" in name]:
                del node.metadata_props[name]


def _encoder_options(model: Any) -> dict[str, Any]:
    has_head = hasattr(model, "base_model") and model.base_model is not model
    axes = {0: _dim("batch"), 1: _dim("tokens")}
    return {
        "model": _Encoder(model).eval(),
        "args": (EXAMPLE, torch.ones_like(EXAMPLE)),
        "input_names": ["input_ids", "attention_mask"],
        "output_names": ["logits" if has_head else "last_hidden_state"],
        "dynamic_shapes": {"input_ids": axes, "attention_mask": axes},
    }


def _decoder_options(model: Any) -> dict[str, Any]:
    layers = model(input_ids=EXAMPLE, use_cache=True).past_key_values.layers
    past = [tuple(each[:, :, :EXAMPLE_PAST].contiguous() for each in (x.keys, x.values)) for x in layers]
    batch = _dim("batch")
    in_cache = ({0: batch, 2: _dim("past_tokens")},) * 2
    names = [f"{number}.{kind}" for number in range(len(past)) for kind in ("key", "value")]
    return {
        "model": _Decoder(model).eval(),
        "args": (EXAMPLE[:, EXAMPLE_PAST:], torch.ones_like(EXAMPLE), past),
        "input_names": ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
        "output_names": ["logits", *(f"present.{name}" for name in names)],
        "dynamic_shapes": {
            "input_ids": {0: batch, 1: _dim("tokens")},
            "attention_mask": {0: batch, 1: _dim("past_and_new_tokens")},
            "past": [in_cache] * len(past),
        },
    }


def _dim(name: str) -> Any:
    return torch.export.Dim(name, min=0 if name == "past_tokens" else 1)


def _replace_integer_maps(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if not isinstance(module, IntegerMap):
            continue
        if module.num_bits != 8 or module.group_size is not None:
            raise ConfigError(
                f"--format onnx: {name} has {module.num_bits}-bit weights in groups; the export keeps int8 "
                "weights with one scale a row, or floating-point ones"
            )
        model.set_submodule(name, _Int8Product(module))


def _translations() -> dict[Any, Any]:
    """How the marker is written in ONNX. Raises ConfigError where onnxscript is missing."""
    try:
        import onnx  # noqa: F401
        from onnxscript import opset18
    except ImportError as error:
        raise ConfigError(f"--format onnx needs {error.name}: {INSTALL}") from None

    op: Any = opset18

    def product(x: Any, weight_KN: Any, scale: Any, per_token: bool) -> Any:
        if per_token:
            largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
            step = op.Max(largest / op.Constant(value_float=127.0), op.Constant(value_float=1e-12))
            shifted = op.Round(x / step) + op.Constant(value_float=128.0)
            integers = op.Cast(shifted, to=2)  # uint8
            zero = op.Cast(op.Constant(value_int=128), to=2)
        else:
            integers, step, zero = op.DynamicQuantizeLinear(x)
        y = op.Cast(op.MatMulInteger(integers, weight_KN, zero), to=1)
        return y * step * scale

    return {torch.ops.ffsplit.int8_product.default: product}
