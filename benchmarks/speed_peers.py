"""What one would pick instead of FFSplit on the same dense model: other tools' int8 and int4."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Forward = Callable[[torch.Tensor], Any]
SLOW_ONES = ("torchao int8", "llm-compressor W8A8")
"""They take longer than the dense model."""
ENGINES = ("onnxruntime int8", "OpenVINO int8")
"""They run exported models, compressed ones too."""
ENCODER_PEERS = ("torch dynamic int8", "torchao int8", *ENGINES, "OpenVINO", "llm-compressor W8A8")


def encoder_peers(dense: Any, notes: list[str], *, names: Collection[str]) -> dict[str, Forward]:
    """Forward passes of what runs here of `names`; what does not is said in `notes`."""
    made: dict[str, Forward] = {}
    with tempfile.TemporaryDirectory() as folder:
        graph = cache(lambda: exported(dense, Path(folder)))
        for name, make in (
            ("torch dynamic int8", lambda: runs(torch_dynamic(dense))),
            ("torchao int8", lambda: runs(torchao(dense, "Int8DynamicActivationInt8WeightConfig"))),
            ("onnxruntime int8", lambda: onnxruntime_int8(graph())),
            ("OpenVINO", lambda: openvino_forward(graph(), notes, int8=False)),
            ("OpenVINO int8", lambda: openvino_forward(graph(), notes, int8=True)),
            ("llm-compressor W8A8", lambda: runs(llm_compressor(dense))),
        ):
            if name in names:
                made_where_it_runs(name, make, made, notes)
    return made


def causal_peers(dense: Any, notes: list[str]) -> dict[str, Any]:
    """Models of what runs here."""
    made: dict[str, Any] = {}
    int4 = {"group_size": 64, "int4_packing_format": "opaque"}
    for name, make in (
        ("torch dynamic int8", lambda: torch_dynamic(dense)),
        ("torchao int8", lambda: torchao(dense, "Int8DynamicActivationInt8WeightConfig")),
        ("torchao int4, in bfloat16", lambda: torchao(dense.bfloat16(), "Int4WeightOnlyConfig", **int4)),
    ):
        made_where_it_runs(name, make, made, notes)
        dense.float()
    return made


def made_where_it_runs(name: str, make: Callable[[], Any], made: dict[str, Any], notes: list[str]) -> None:
    """Make one more; where that fails, say why in `notes`."""
    try:
        made[name] = make()
    except Exception as error:  # of whatever kind a tool raises where it cannot run
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        notes.append(f"{name}: not run here ({type(error).__name__}: {reason[:160]})")


def runs(model: Any) -> Forward:
    return lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def torch_dynamic(dense: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, torch.qint8)


def torchao(dense: Any, config: str, **options: Any) -> Any:
    """Not compiled, as the others are not."""
    import torchao.quantization

    model = copy.deepcopy(dense)
    torchao.quantization.quantize_(model, getattr(torchao.quantization, config)(**options))
    return model


@torch.no_grad()
def llm_compressor(dense: Any) -> Any:
    """Its scheme W8A8 as compressed-tensors runs it where there is no vLLM.

    llm-compressor itself asks for an earlier transformers than this package is tested with; its output is
    what this library reads, whose forward pass rounds in floating point.
    """
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = copy.deepcopy(dense)
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.copy_(module.weight.abs().amax(1, keepdim=True) / 127)
            module.quantization_status = QuantizationStatus.FROZEN
    return model


def exported(dense: Any, folder: Path) -> Path:
    """The dense model as an ONNX graph, in a folder."""
    from ffsplit.runtime.export import export_onnx

    dense.save_pretrained(folder)
    return export_onnx(folder, folder / "model.onnx")


def onnxruntime_int8(graph: Path) -> Forward:
    """As `ffsplit export --quantize int8` quantizes it."""
    import onnxruntime

    from ffsplit.runtime.onnx_tools import quantize_graph

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(quantize_graph(graph)), options)
    return lambda ids: session.run(None, _feed(ids))


def openvino_forward(graph: Path, notes: list[str], *, int8: bool) -> Forward:
    """As OpenVINO runs it by default; with `int8`, quantized by its own NNCF, inputs too, on random tokens.

    The default precision is bfloat16 on processors that multiply it, which the page says.
    """
    import openvino

    model = openvino.Core().read_model(graph)
    if int8:
        import nncf

        nncf.set_log_level(logging.ERROR)
        rows = [_feed(torch.randint(1000, 20000, (1, 128))) for _ in range(8)]
        options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(rows)}
        model = nncf.quantize(model, nncf.Dataset(rows), **options)
    limits = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", limits)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    name, version = "OpenVINO" + " int8" * int8, openvino.__version__.split("-")[0]
    notes.append(f"{name}: {version}, computes {'the rest ' * int8}in {precision}")
    return lambda ids: compiled(_feed(ids))


def _feed(ids: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, dtype=np.int64)}
