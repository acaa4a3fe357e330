"""`ffsplit export`: an artifact as one ONNX file with dynamic axes, with the model's other files beside it.

Weights in int8 stay int8, multiplied by MatMulInteger.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ffsplit.directories import user_path
from ffsplit.errors import ConfigError, explained, reason_of
from ffsplit.models.checkpoint import tokenizer_files
from ffsplit.models.folder import CONFIG_NAME, local_listing, sort_files
from ffsplit.models.inputs import MEDIUM_OF
from ffsplit.models.load import decodes, load_whole_model, quiet_transformers, tokenizer_in
from ffsplit.models.names import main_inputs
from ffsplit.models.source_card import CARD_NAME
from ffsplit.runtime.export_compressed_tensors import Scheme, export_compressed_tensors
from ffsplit.runtime.kernels.int8 import SMALLEST_STEP
from ffsplit.runtime.onnx_tools import Quantization, check_tools, optimize_graph, quantize_graph
from ffsplit.runtime.quantized_linear import QuantizedLinear
from ffsplit.store.entries import MANIFEST_NAME, check_outside_attempts
from ffsplit.store.pull import materialize

ExportFormat = Literal["onnx", "compressed-tensors"]

COMPRESSED_TENSORS = "compressed-tensors"
ONNX_FOLDER = "onnx"
"""The subfolder of a model in which sentence-transformers, optimum and transformers.js look for graphs."""


def export(
    uri: str,
    *,
    format: ExportFormat,
    out: Path,
    scheme: Scheme | None = None,
    optimize: bool = False,
    quantize: Quantization | None = None,
) -> Path:
    """Write the artifact, or the dense model, at `uri` into the new directory `out`.

    Returns its main file, or the directory if it is a checkpoint. `scheme` is for compressed-tensors.

    The config, the tokenizer and the modules of sentence-transformers are copied beside it, so that the new
    directory is read like the old. With `optimize`, onnxruntime fuses the graph's operators; with `quantize`,
    it writes a quantized graph beside it, which is then the main file. Raises ConfigError, with nothing
    written, if `out` is not empty, the extra is missing, or the format cannot hold the model.
    """
    if scheme is not None and format != COMPRESSED_TENSORS:
        raise ConfigError(f"--scheme goes with --format compressed-tensors, not with {format}")
    if (optimize or quantize is not None) and format != "onnx":
        flag = "--optimize" if optimize else "--quantize"
        raise ConfigError(f"{flag} goes with --format onnx, not with {format}")
    check_tools(optimize=optimize, quantize=quantize, install=INSTALL)
    check_outside_attempts(out.resolve().as_posix(), flag="--out")
    _check_is_free(out)
    local = user_path(uri)
    is_checkpoint = (local / "config.json").is_file() and not (local / MANIFEST_NAME).is_file()
    directory = local if is_checkpoint else materialize(uri)
    graph = Path(ONNX_FOLDER, FILE_NAME) if format == "onnx" else Path()
    with ExitStack() as stack:
        with explained(f"--out {out} cannot be written"):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-"))
        whole = Path(folder) / "out"
        (whole / graph.parent).mkdir(parents=True)
        if format == COMPRESSED_TENSORS:
            _copy_companions(directory, whole)
            export_compressed_tensors(directory, whole, scheme=scheme)
        else:
            export_onnx(directory, whole / graph)
            if optimize:
                optimize_graph(whole / graph, config=json.loads((directory / CONFIG_NAME).read_text("utf-8")))
            if quantize is not None:
                graph = quantize_graph(whole / graph).relative_to(whole)
            _copy_companions(directory, whole)
        try:
            whole.rename(out)  # also replaces an empty directory
        except OSError:
            _check_is_free(out)  # another export may have been faster
            raise
    return out / graph


def _check_is_free(out: Path) -> None:
    """Raise ConfigError, which tells what is there, unless `out` is a new or an empty directory."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a new or empty directory")
    if names := sorted(each.name for each in out.iterdir()):
        raise ConfigError(
            f"--out {out} holds {_what_is_in(out, names)} already: give a directory per export, or delete "
            "this one first"
        )


def _what_is_in(directory: Path, names: Sequence[str]) -> str:
    if MANIFEST_NAME in names:
        return "an artifact"
    graphs = sorted(each.name for each in directory.glob(f"{ONNX_FOLDER}/*.onnx"))
    if graphs:
        return f"an ONNX export ({', '.join(graphs)})"
    if CONFIG_NAME in names:
        is_export = f'"{COMPRESSED_TENSORS}"' in (directory / CONFIG_NAME).read_text("utf-8", "replace")
        return "a compressed-tensors export" if is_export else "a checkpoint"
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _copy_companions(source: Path, target: Path) -> None:
    """Copy the config and every other file except weights, graphs, and an artifact's own records and card."""
    is_artifact = (source / MANIFEST_NAME).is_file()
    for name in (CONFIG_NAME, *sort_files(local_listing(source)).companions):
        if is_artifact and name == CARD_NAME:  # it says how to load the artifact
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


INSTALL = "pip install 'ffsplit[onnx]'"
FILE_NAME = "model.onnx"
OPSET = 18
STATES, MASK = "last_hidden_state", "attention_mask"
EXAMPLE_PAIR = ("How are you?", "I am well.")
EXAMPLE, EXAMPLE_PAST = torch.arange(5, 19).reshape(2, 7), 3
Inputs = dict[str, Tensor]
Cache = list[tuple[Tensor, Tensor]]


@torch.library.custom_op("ffsplit::int8_product", mutates_args=())
def int8_product(x: Tensor, weight_KN: Tensor, scale: Tensor) -> Tensor:
    """x times an int8 matrix with one scale per column: a marker that becomes ONNX's own operators."""
    return x @ (weight_KN.to(x.dtype) * scale)


@int8_product.register_fake
def _(x: Tensor, weight_KN: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_KN.shape[1])


class _Int8Product(nn.Module):
    """Stands in for a QuantizedLinear during export."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        weight, scale = linear.tensors().values()
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("scale", scale[:, 0].float())
        self.bias, self.activation = linear.bias, linear.activation

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        y: Tensor = int8_product(x, self.weight, self.scale)
        added = self.bias if plus is None else plus
        y = y if added is None else y + added
        return y if self.activation is None else self.activation(y)


class _Encoder(nn.Module):
    """A model as a function of its inputs by name, with the named outputs."""

    def __init__(self, model: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        result = self.model(**inputs, return_dict=True)
        return tuple(result[name] for name in self.outputs)


class _Decoder(nn.Module):
    """A causal model as a function of new tokens, and of the keys and values of past tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in _parameters(model)

    def forward(self, inputs: Inputs, past: Cache) -> tuple[Tensor, Cache]:
        """The mask covers past and new tokens. Padding on the left does not count as positions."""
        options = dict(inputs)
        if self.takes_positions and "position_ids" not in options:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
        result = self.model(past_key_values=DynamicCache(past), use_cache=True, return_dict=True, **options)
        return result.logits, [(layer.keys, layer.values) for layer in result.past_key_values.layers]


def export_onnx(directory: Path, target: Path) -> Path:
    """Write a checkpoint's model to `target`, in float32 except for its integers. Returns that file.

    Inputs are those outputs of the tokenizer that the model takes, [batch, tokens] each: `input_ids`,
    `attention_mask`, and `token_type_ids` if the model uses them for pairs of texts. Outputs have the
    model's own names: `logits`, `start_logits` and `end_logits`, or `last_hidden_state` of a model without
    a head. Causal models with a head also take `past_key_values.N.key` and `.value` [batch, heads, past
    tokens, size], with zero past tokens at first, and return `present.N.key` and `.value`. Raises
    ConfigError if the extra is missing or the format cannot hold the model.
    """
    translations = _translations()
    config = json.loads((directory / "config.json").read_text("utf-8"))
    class_name = (config.get("architectures") or [""])[0]
    model = load_whole_model(directory, class_name, dtype=torch.float32)
    _replace_quantized_linears(model)
    inputs = example_inputs(model, directory)
    try:
        with quiet_transformers(), _quiet_exporter(), torch.no_grad():
            options = (_decoder_options if decodes(model) else _encoder_options)(model, inputs)
            program = torch.onnx.export(
                **options,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translations,
                verbose=False,
            )
            assert program is not None
            _drop_source_paths(program.model)
            program.save(str(target))
    except Exception as error:  # the exporter's error names the failed step, its cause the reason
        why = reason_of(error.__cause__ or error)
        raise ConfigError(f"{type(model).__name__} could not be exported to ONNX: {why}") from error
    return target


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about optional packages and axis names."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _drop_source_paths(model: Any) -> None:
    """Remove the source file and line of each node: they are local paths."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for name in [name for name in node.metadata_props if "stack_trace" in name]:
                del node.metadata_props[name]


def example_inputs(model: Any, directory: Path) -> Inputs:
    """Example inputs by name: what the tokenizer returns for two texts and the model takes.

    Without a tokenizer: token ids and their mask. Raises ConfigError for a model that reads no text, or not
    only text.
    """
    takes = _parameters(model)
    _check_reads_text(model, takes)
    if tokenizer_files(directory):
        tokenizer = tokenizer_in(directory)
        with explained(f"{directory}: its tokenizer does not read a pair of texts"):
            given = dict(tokenizer(*EXAMPLE_PAIR, return_tensors="pt"))
    else:
        given = {name: torch.zeros(1, 2, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    num_tokens = given["input_ids"].shape[1]
    inputs = {}
    for name in takes:
        if name in given:
            shape = [EXAMPLE.shape[1] if size == num_tokens else size for size in given[name].shape[1:]]
            inputs[name] = torch.zeros(len(EXAMPLE), *shape, dtype=given[name].dtype)
    return (
        inputs
        | {"input_ids": EXAMPLE % model.config.get_text_config().vocab_size}
        | ({"attention_mask": torch.ones_like(EXAMPLE)} if "attention_mask" in inputs else {})
    )


def _check_reads_text(model: Any, takes: Sequence[str]) -> None:
    """Raise ConfigError for a model that reads no text, or has towers that read something else."""
    needed, *_ = main_inputs(model)
    towers = [name for name in getattr(model.config, "sub_configs", {}) if name != "text_config"]
    others = [name for name in takes if towers and MEDIUM_OF.get(name, "text") != "text"]
    if MEDIUM_OF.get(needed) != "text" or others:
        reads = others[0] if others else needed
        raise ConfigError(f"--format onnx is for models that read only text; this one reads {reads}")


def _parameters(model: Any) -> list[str]:
    """The names of the arguments of a model's forward."""
    return list(inspect.signature(model.forward).parameters)


def _encoder_options(model: Any, inputs: Inputs) -> dict[str, Any]:
    result = model(**inputs, return_dict=True)
    outputs = [name for name, value in result.items() if isinstance(value, Tensor)]
    if outputs[0] == STATES:  # a pooler may be newly initialized, so its output is left out
        outputs = [STATES]
    return {
        "model": _Encoder(model, outputs).eval(),
        "kwargs": {"inputs": inputs},
        "input_names": list(inputs),
        "output_names": outputs,
        "dynamic_shapes": {"inputs": _axes(inputs, batch=_dim("batch"), tokens=_dim("tokens"))},
    }


def _decoder_options(model: Any, inputs: Inputs) -> dict[str, Any]:
    layers = model(**inputs, use_cache=True).past_key_values.layers
    past = [tuple(each[:, :, :EXAMPLE_PAST].contiguous() for each in (x.keys, x.values)) for x in layers]
    new = {name: value if name == MASK else value[:, EXAMPLE_PAST:] for name, value in inputs.items()}
    new.setdefault(MASK, torch.ones_like(EXAMPLE))
    batch = _dim("batch")
    axes = _axes(new, batch=batch, tokens=_dim("tokens"))
    axes[MASK] = {0: batch, 1: _dim("past_and_new_tokens")}
    in_cache = ({0: batch, 2: _dim("past_tokens")},) * 2
    names = [f"{number}.{kind}" for number in range(len(past)) for kind in ("key", "value")]
    return {
        "model": _Decoder(model).eval(),
        "kwargs": {"inputs": new, "past": past},
        "input_names": [*new, *(f"past_key_values.{name}" for name in names)],
        "output_names": ["logits", *(f"present.{name}" for name in names)],
        "dynamic_shapes": {"inputs": axes, "past": [in_cache] * len(past)},
    }


def _axes(inputs: Inputs, *, batch: Any, tokens: Any) -> dict[str, dict[int, Any]]:
    """The dynamic axes of each input: its rows, and its tokens if it has them."""
    length = inputs["input_ids"].shape[1]
    return {
        name: {0: batch} | ({1: tokens} if value.dim() > 1 and value.shape[1] == length else {})
        for name, value in inputs.items()
    }


def _dim(name: str) -> Any:
    return torch.export.Dim(name, min=0 if name == "past_tokens" else 1)


def _replace_quantized_linears(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        if module.num_bits != 8 or module.group_size is not None:
            raise ConfigError(
                f"--format onnx: {name} has {module.num_bits}-bit weights in groups; the export keeps int8 "
                "weights with one scale per row, or floating-point weights"
            )
        model.set_submodule(name, _Int8Product(module))


def _translations() -> dict[Any, Any]:
    """How the marker is written in ONNX. Raises ConfigError if onnxscript is missing."""
    try:
        import onnx  # noqa: F401
        from onnxscript import opset18
    except ImportError as error:
        raise ConfigError(f"--format onnx needs {error.name}: {INSTALL}") from None

    op: Any = opset18

    def product(x: Any, weight_KN: Any, scale: Any) -> Any:
        largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
        step = op.Max(largest / op.Constant(value_float=127.0), op.Constant(value_float=SMALLEST_STEP))
        integers = op.Cast(op.Round(x / step) + op.Constant(value_float=128.0), to=2)  # uint8
        zero = op.Cast(op.Constant(value_int=128), to=2)
        y = op.Cast(op.MatMulInteger(integers, weight_KN, zero), to=1)
        return y * step * scale

    return {torch.ops.ffsplit.int8_product.default: product}
