"""onnxruntime's own tools on an exported graph: its fusions, and dynamic int8 quantization."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ffsplit.errors import ConfigError, explained

Quantization = Literal["int8"]

QUANTIZED_NAME = "model_quantized.onnx"
"""What optimum calls a quantized graph, and transformers.js looks for with `dtype: "q8"`."""
FUSIONS = {
    "bert": ("albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"),
    "gpt2": ("gpt2",),
}
"""The families that onnxruntime's optimizer has fusions for, and this export was tried with, by its names."""
MOST_OPTIMIZED, MOST_QUANTIZED = 1e-3, 0.5
"""By how much of its norm an output may change. Quantization changes that of a MiniLM by 0.15."""
EXAMPLE_TOKENS, FIRST_TOKEN = 16, 5


def check_tools(*, optimize: bool, quantize: Quantization | None, install: str) -> None:
    """Raise ConfigError if a tool is asked for and its library is missing."""
    if not optimize and quantize is None:
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime.quantization
        import onnxruntime.transformers.optimizer  # noqa: F401
    except ImportError as error:
        flag = "--optimize" if optimize else f"--quantize {quantize}"
        raise ConfigError(f"{flag} needs {error.name}: {install}") from None


def optimize_graph(graph: Path, *, config: Mapping[str, Any]) -> None:
    """Replace a graph by onnxruntime's optimized one, for CPUs and GPUs alike.

    Families that its optimizer knows get its fusions. Others get the optimizations that a session makes at
    its extended level: none of them depends on this machine. Raises ConfigError if the outputs differ.
    """
    with _beside(graph) as optimized:
        with explained(f"onnxruntime cannot optimize {graph.name}"):
            _optimize(graph, optimized, config=config)
        _check_outputs(optimized, graph, most=MOST_OPTIMIZED)


def _optimize(graph: Path, optimized: Path, *, config: Mapping[str, Any]) -> None:
    family = next((name for name, known in FUSIONS.items() if config.get("model_type") in known), None)
    if family is None:
        _optimize_by_session(graph, optimized)
        return
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    fusions = FusionOptions(family)
    fusions.enable_embed_layer_norm = False  # quantized, it gives an MPNet other embeddings
    heads = config.get("num_attention_heads") or config.get("n_heads") or config.get("n_head") or 0
    hidden = config.get("hidden_size") or config.get("dim") or config.get("n_embd") or 0
    found = optimize_model(
        str(graph), family, num_heads=heads, hidden_size=hidden, optimization_options=fusions
    )
    found.save_model_to_file(str(optimized), use_external_data_format=_data_of(graph).exists())


def _optimize_by_session(graph: Path, optimized: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimized)
    if _data_of(graph).exists():
        name = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(name, _data_of(optimized).name)
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def quantize_graph(graph: Path) -> Path:
    """Write a graph's int8 form beside it, and return it: one scale per channel, inputs scaled as they come.

    Where this machine's x86 processor lacks VNNI, weights have 7 bits: its products of 8 bits overflow.
    Raises ConfigError if the outputs are far from the graph's own.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = graph.with_name(QUANTIZED_NAME)
    with _quiet_advice(), explained(f"onnxruntime cannot quantize {graph.name}"):
        _drop_shapes_of_weights(graph)
        quantize_dynamic(
            graph,
            target,
            per_channel=True,
            reduce_range=not multiplies_int8(getattr(torch.cpu, "get_capabilities", dict)()),
            weight_type=QuantType.QInt8,
            use_external_data_format=_data_of(graph).exists(),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of outputs of fused operators
        )
    _check_outputs(target, graph, most=MOST_QUANTIZED)
    return target


def _check_outputs(made: Path, graph: Path, *, most: float) -> None:
    """Raise ConfigError if the first output of a graph is not close to the original graph's."""
    import onnxruntime

    with explained(f"onnxruntime cannot run {made.name}"):
        sessions = [
            onnxruntime.InferenceSession(str(each), providers=["CPUExecutionProvider"])
            for each in (graph, made)
        ]
        feed = _example_of(sessions[0])
        expected, found = (session.run(None, feed)[0] for session in sessions)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= most:
        raise ConfigError(
            f"onnxruntime's {made.name} differs from the model by {error:.3g} of its output's norm, more "
            f"than {most:g}: export without this flag"
        )


def _example_of(session: Any) -> dict[str, NDArray[Any]]:
    """Two rows of tokens for a graph, without padding and without past tokens."""
    sizes = {"batch": 2, "tokens": EXAMPLE_TOKENS, "past_and_new_tokens": EXAMPLE_TOKENS, "past_tokens": 0}
    feed: dict[str, NDArray[Any]] = {}
    for each in session.get_inputs():
        shape = [sizes[size] if isinstance(size, str) else size for size in each.shape]
        dtype = np.int64 if each.type == "tensor(int64)" else np.float32
        feed[each.name] = np.zeros(shape, dtype)
    ids = feed["input_ids"]
    ids[:] = np.arange(ids.size).reshape(ids.shape) + FIRST_TOKEN
    if "attention_mask" in feed:
        feed["attention_mask"][:] = 1
    return feed


def _drop_shapes_of_weights(graph: Path) -> None:
    """Remove the notes on the shapes of weights, which have their own.

    The exporter writes them. The quantizer transposes some weights, and then takes the notes for errors.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    weights = {each.name for each in model.graph.initializer}
    kept = [each for each in model.graph.value_info if each.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, str(graph))


def multiplies_int8(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor adds products of 8-bit integers without overflow, from torch's description."""
    if capabilities.get("architecture", "x86_64") != "x86_64":
        return True
    return any(capabilities.get(name) for name in ("avx_vnni", "avx512_vnni", "amx_int8"))


@contextmanager
def _quiet_advice() -> Iterator[None]:
    """Silence the quantizer's advice to preprocess the graph, which is for static quantization."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _beside(graph: Path) -> Iterator[Path]:
    """A path of the same name to write to, whose file then replaces the graph, weights in files too."""
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        written = Path(folder) / graph.name
        yield written
        _data_of(graph).unlink(missing_ok=True)
        for path in Path(folder).iterdir():
            shutil.move(path, graph.parent / path.name)


def _data_of(graph: Path) -> Path:
    """Where the weights of a graph above 2 GB are."""
    return graph.with_name(f"{graph.name}.data")
