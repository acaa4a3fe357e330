"""Single matrix products on a GPU by every library at hand, beside bfloat16's, as a table.

    python benchmarks/products_gpu.py [--only NAME ...] [--shapes NAME ...]

Each engine makes a function from the same weights, and all take turns; times are medians of CUDA graphs that
are replayed with a cold L2 cache, and errors are relative to a float32 product. What an engine does to its
inputs, such as rounding them, is part of its time. An engine that is not installed, or refuses a shape, is
told in a line. What came of it is in speed-notes.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
ROUNDS, WARM_UPS = 30, 3
FP8_MAX, INT8_MAX = 448.0, 127.0


class Shape(NamedTuple):
    """Rows of inputs, columns of inputs, columns of outputs."""

    rows: int
    inputs: int
    outputs: int


SHAPES = {
    "BERT-base up, 32 x 512": Shape(16384, 768, 1024),
    "BERT-base up, 8 x 128": Shape(1024, 768, 1024),
    "BERT-base down, 32 x 512": Shape(16384, 1024, 768),
    "Llama-7B up, 1 token": Shape(1, 4096, 11008),
    "Llama-7B up, 16 tokens": Shape(16, 4096, 11008),
    "Llama-7B up, 2,048 tokens": Shape(2048, 4096, 11008),
    "Llama-7B down, 1 token": Shape(1, 11008, 4096),
    "Llama-7B down, 2,048 tokens": Shape(2048, 11008, 4096),
}


def bfloat16(weight: Tensor) -> Product:
    return partial(torch.nn.functional.linear, weight=weight)


def rowwise(values: Tensor, most: float) -> tuple[Tensor, Tensor]:
    scale = values.abs().amax(1, keepdim=True).float().clamp(min=1e-6) / most
    return values.float() / scale, scale


def scaled_fp8(weight: Tensor, *, compiled: bool) -> Product:
    """torch._scaled_mm with one scale per row of inputs and per row of weights."""
    scaled, scale = rowwise(weight, FP8_MAX)
    stored = scaled.to(torch.float8_e4m3fn)

    def product(x: Tensor) -> Tensor:
        rows, row_scale = rowwise(x, FP8_MAX)
        return torch._scaled_mm(
            rows.to(torch.float8_e4m3fn), stored.t(), row_scale, scale.t(), out_dtype=torch.bfloat16
        )

    return torch.compile(product, dynamic=False) if compiled else product


def int_mm(weight: Tensor, *, compiled: bool) -> Product:
    """torch._int_mm with one scale per row of inputs and per row of weights."""
    scaled, scale = rowwise(weight, INT8_MAX)
    stored = scaled.round().to(torch.int8)

    def product(x: Tensor) -> Tensor:
        rows, row_scale = rowwise(x, INT8_MAX)
        sums = torch._int_mm(rows.round().to(torch.int8), stored.t())
        return (sums * row_scale * scale.t()).to(torch.bfloat16)

    return torch.compile(product, dynamic=False) if compiled else product


def ours(weight: Tensor, *, num_bits: Literal[4, 8], group_size: int | None) -> Product:
    from ffsplit.ffn.shapes import Integer
    from ffsplit.runtime.quantized_linear import QuantizedLinear

    layer = QuantizedLinear(Integer(num_bits=num_bits, group_size=group_size), *weight.shape, bias=False)
    layer.hold(_stored(weight, num_bits, group_size))
    return layer.to(weight.device)


def triton_few(weight: Tensor, *, num_bits: Literal[4, 8], group_size: int | None, **options: Any) -> Product:
    from products_triton import few_rows

    return partial(few_rows, **_stored(weight, num_bits, group_size), **options)


def triton_int8(weight: Tensor, *, tile: tuple[int, int, int]) -> Product:
    from products_triton import many_rows

    return partial(many_rows, **_stored(weight, 8, None), tile=tile)


def stored_by_fp8(weight: Tensor, *, num_bits: Literal[4, 8], group_size: int | None) -> Product:
    """Integers that become fp8 for every product, then torch._scaled_mm."""
    from products_triton import by_fp8

    return partial(by_fp8, **_stored(weight, num_bits, group_size))


def _stored(weight: Tensor, num_bits: Literal[4, 8], group_size: int | None) -> dict[str, Tensor]:
    from ffsplit.ffn.quantization import quantize_rows, scales_of

    scale = scales_of(weight, num_bits=num_bits, group_size=group_size)
    return quantize_rows(weight, scale, num_bits=num_bits, group_size=group_size)


def int4pack(weight: Tensor, *, group_size: int) -> Product:
    """torch._weight_int4pack_mm, which has a zero point per group."""
    groups = weight.float().view(len(weight), -1, group_size)
    scale = groups.abs().amax(2) / 7
    integers = (groups / scale[..., None]).round().clamp(-8, 7).view_as(weight).int() + 8
    packed = (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)
    stored = torch._convert_weight_to_int4pack(packed, 8)
    scales = torch.stack([scale, torch.zeros_like(scale)], 2).transpose(0, 1).contiguous().to(weight.dtype)
    return lambda x: torch._weight_int4pack_mm(x, stored, group_size, scales)


def humming(weight: Tensor, *, bits: str, group_size: int, inputs: str | None = None) -> Product:
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=weight.shape[0],
        shape_k=weight.shape[1],
        weight_config={"dtype": bits, "group_size": group_size},
        input_config={"dtype": inputs} if inputs else None,
        torch_dtype=weight.dtype,
    ).to(weight.device)
    layer.load_from_unquantized(weight)
    layer.transform()
    return layer  # type: ignore[no-any-return]


def gemlite_int8(weight: Tensor) -> Product:
    from gemlite.helper import A8W8_int8_dynamic

    layer = A8W8_int8_dynamic(device=str(weight.device), dtype=weight.dtype).from_weights(weight.clone())
    return partial(_call, layer)


def gemlite_int4(weight: Tensor, *, group_size: int) -> Product:
    from gemlite.helper import A16Wn

    groups = weight.float().view(len(weight), -1, group_size)
    scale = groups.abs().amax(2, keepdim=True) / 7
    integers = (groups / scale).round().clamp(-8, 7).view_as(weight) + 8
    scales = scale[..., 0].to(weight.dtype)
    layer = A16Wn(device=str(weight.device), dtype=weight.dtype).from_weights(
        integers.to(torch.uint8), scales, torch.full_like(scales, 8), 4, group_size
    )
    return partial(_call, layer)


def _call(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def torchao(weight: Tensor, *, config: str, **options: Any) -> Product:
    import torchao.quantization as ao

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    model = torch.nn.Sequential(linear)
    ao.quantize_(model, getattr(ao, config)(**options))
    return torch.compile(model, dynamic=False)  # type: ignore[no-any-return]


ENGINES: dict[str, Callable[[Tensor], Product]] = {
    "bfloat16": bfloat16,
    "torch._scaled_mm, fp8": partial(scaled_fp8, compiled=False),
    "torch._scaled_mm, fp8, compiled": partial(scaled_fp8, compiled=True),
    "torch._int_mm": partial(int_mm, compiled=False),
    "torch._int_mm, compiled": partial(int_mm, compiled=True),
    "this package, int8": partial(ours, num_bits=8, group_size=None),
    "this package, int4, groups of 32": partial(ours, num_bits=4, group_size=32),
    "Triton int8, few rows": partial(triton_few, num_bits=8, group_size=None, tile=(32, 256, 1)),
    "Triton int8, few rows, split": partial(triton_few, num_bits=8, group_size=None, tile=(64, 128, 4)),
    "Triton int4, few rows": partial(triton_few, num_bits=4, group_size=64, tile=(32, 128, 1)),
    "Triton int4, few rows, split": partial(triton_few, num_bits=4, group_size=64, tile=(64, 64, 4)),
    "Triton int8, integers": partial(triton_int8, tile=(128, 256, 128)),
    "int8 as fp8": partial(stored_by_fp8, num_bits=8, group_size=None),
    "int4 as fp8": partial(stored_by_fp8, num_bits=4, group_size=64),
    "torch._weight_int4pack_mm, groups of 32": partial(int4pack, group_size=32),
    "humming W8A16": partial(humming, bits="int8", group_size=0),
    "humming W8A8, int8": partial(humming, bits="int8", group_size=0, inputs="int8"),
    "humming W8A8, fp8": partial(humming, bits="float8e4m3", group_size=0, inputs="float8e4m3"),
    "humming W4A16, groups of 32": partial(humming, bits="int4", group_size=32),
    "humming W4A16, groups of 128": partial(humming, bits="int4", group_size=128),
    "humming W4A8, groups of 128": partial(humming, bits="int4", group_size=128, inputs="int8"),
    "gemlite A8W8, int8": gemlite_int8,
    "gemlite A16W4, groups of 64": partial(gemlite_int4, group_size=64),
    "torchao int8, dynamic": partial(torchao, config="Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8, dynamic": partial(torchao, config="Float8DynamicActivationFloat8WeightConfig"),
    "torchao int4": partial(torchao, config="Int4WeightOnlyConfig", group_size=32),
}


@torch.inference_mode()
def captured(product: Product, x: Tensor) -> Callable[[], None]:
    """The product as a CUDA graph, without launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x)

    def replay(_: Any = (product, x, y)) -> None:  # a graph does not keep the tensors that it reads
        graph.replay()

    return replay


def milliseconds(replay: Callable[[], None], cold: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cold.zero_()
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def table(name: str, shape: Shape, engines: dict[str, Callable[[Tensor], Product]]) -> list[str]:
    torch.manual_seed(0)
    weight = torch.randn(shape.outputs, shape.inputs, device="cuda", dtype=torch.bfloat16) / 32
    x = torch.randn(shape.rows, shape.inputs, device="cuda", dtype=torch.bfloat16)
    exact, cold = x.float() @ weight.float().T, torch.empty(1 << 26, device="cuda")
    replays, errors, lines = {}, {}, []
    for engine, make in engines.items():
        try:
            with torch.inference_mode():
                product = make(weight)
                errors[engine] = float((product(x).float() - exact).norm() / exact.norm())
            replays[engine] = captured(product, x)
        except Exception as error:  # of whatever kind a library raises
            lines.append(f"{name}: {engine}: {type(error).__name__}: {str(error)[:160]!r}")
    times: dict[str, list[float]] = {engine: [] for engine in replays}
    for _ in range(ROUNDS):
        for engine, replay in replays.items():
            times[engine].append(milliseconds(replay, cold))
    dense = statistics.median(times["bfloat16"])
    lines += ["", f"| {name} | microseconds | x bfloat16 | error |", "|---|---|---|---|"]
    for engine, each in times.items():
        median = statistics.median(each)
        lines.append(f"| {engine} | {1e3 * median:.1f} | {dense / median:.2f} | {errors[engine]:.4f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(ENGINES), help="engines whose names begin so")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="shapes whose names begin so")
    parsed = parser.parse_args()
    engines = {
        name: make
        for name, make in ENGINES.items()
        if name == "bfloat16" or name.startswith(tuple(parsed.only))
    }
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    for name, shape in SHAPES.items():
        if name.startswith(tuple(parsed.shapes)):
            print("\n".join(table(name, shape, engines)), flush=True)


if __name__ == "__main__":
    main()
