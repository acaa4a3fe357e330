"""onnxruntime's own tools on an exported graph: its fusions, and dynamic int8 quantization."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ffsplit.errors import ConfigError, explained

Quantization = Literal["int8"]

QUANTIZED_NAME = "model_quantized.onnx"
"""What optimum calls a quantized graph, and transformers.js looks for with `dtype: "q8"`."""
FUSIONS = {
    "bert": ("albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"),
    "gpt2": ("gpt2",),
}
"""The families that onnxruntime's optimizer has fusions for, and this export was tried with, by its names."""


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
    its extended level: none of them depends on this machine.
    """
    with _beside(graph) as optimized, explained(f"onnxruntime cannot optimize {graph.name}"):
        family = next((name for name, known in FUSIONS.items() if config.get("model_type") in known), None)
        if family is None:
            _optimize_by_session(graph, optimized)
            return
        from onnxruntime.transformers.optimizer import optimize_model

        heads = config.get("num_attention_heads") or config.get("n_heads") or config.get("n_head") or 0
        hidden = config.get("hidden_size") or config.get("dim") or config.get("n_embd") or 0
        found = optimize_model(str(graph), model_type=family, num_heads=heads, hidden_size=hidden)
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
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = graph.with_name(QUANTIZED_NAME)
    with _quiet_advice(), explained(f"onnxruntime cannot quantize {graph.name}"):
        quantize_dynamic(
            graph,
            target,
            per_channel=True,
            reduce_range=not multiplies_int8(torch.cpu.get_capabilities()),
            weight_type=QuantType.QInt8,
            use_external_data_format=_data_of(graph).exists(),
        )
    return target


def multiplies_int8(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor adds products of 8-bit integers without overflow, from torch's description."""
    if capabilities.get("architecture") not in ("x86_64", "amd64", "i386"):
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
