"""How fast compressed models run here, beside what else one would pick: writes speed_<hardware>.md.

    PYTHONPATH=. python benchmarks/speed.py [--quick] [--only bert-base decode load] [--device cuda]

Models have random weights: speed depends on shapes alone, and BERT-base is not in any Python package. All
candidates of a table take turns in one process; figures are medians. On a GPU it needs torch, transformers
and this package's folder, nothing else.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import ffsplit.runtime.plugin
from ffsplit.ffn import FFNShape, Integer, LayerLayout, PartLayout
from ffsplit.measurement.timings import time_models
from ffsplit.measurement.work import work_of
from ffsplit.models.load import quiet_transformers
from ffsplit.recipes.recipe import load_recipe
from ffsplit.runtime.linears import linears_config
from ffsplit.splitting.budget import fit_layers

ROOT = Path(__file__).resolve().parents[1]
KEEP = 0.3535
INT8, INT4 = Integer(num_bits=8), Integer(num_bits=4, group_size=64)
BERTS = {
    "bert-base": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "bert-large": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
}
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
}
SHAPES = {"cpu": ((8, 128), (1, 128), (1, 16)), "cuda": ((32, 512), (1, 128))}
REACH = {
    ("keep .3535", "8 x 128"): "1.65",
    ("keep .3535", "32 x 512"): "1.6",
    ("recipe int8", "8 x 128"): "4.5",
    ("recipe int8", "1 x 128"): "3",
    ("recipe int8", "1 x 16"): "3",
}
Forward = Callable[[torch.Tensor], Any]


def shape_of(config: Any, *, gated: bool = False) -> FFNShape:
    return FFNShape(
        num_neurons=config.intermediate_size,
        hidden_size=config.hidden_size,
        gated=gated,
        up_bias=not gated,
        down_bias=not gated,
    )


def layout_of(shape: FFNShape, recipe: str) -> LayerLayout:
    chosen = load_recipe(recipe)
    return fit_layers([shape], keep=KEEP, heavy=chosen.heavy, steps=chosen.steps)[0]


def int8_part(num_neurons: int, *, gated: bool, format: Integer = INT8) -> PartLayout:
    return PartLayout(num_neurons=num_neurons, up=format, gate=format if gated else None, down=format)


@torch.no_grad()
def split_model(model: Any, layout: LayerLayout, shape: FFNShape, *, linears: tuple[str, ...] = ()) -> Any:
    """A random model whose FFNs are split, in the form of its artifact's config."""
    count = model.config.num_hidden_layers
    config = {
        "quant_method": "ffsplit",
        "version": 2,
        "layers": [layout.model_dump(mode="json")] * count,
        "shapes": [shape.model_dump(mode="json")] * count,
        "linears": linears_config(linears) if linears else None,
    }
    ffsplit.runtime.plugin.install_split_ffns(
        model, [layout] * count, [shape] * count, linears=config["linears"]
    )
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        elif tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif tensor.dtype == torch.float16:
            tensor.fill_(1e-4)
        elif tensor.dim() == 2:
            tensor.data.normal_(std=0.02)
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if not tensor.isfinite().all() or (tensor.dim() == 1 and "Norm" not in type(module).__name__):
                getattr(module, name).data.zero_()
    model.config.quantization_config = config
    return model.eval()


def attention_paths(model: Any, blocks: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{blocks}.{i}.{name}" for i in range(model.config.num_hidden_layers) for name in names)


BERT_ATTENTION = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)
LLAMA_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")


def bert(name: str, *, width: int | None = None) -> Any:
    config = transformers.BertConfig(**BERTS[name], intermediate_size=width or 4 * BERTS[name]["hidden_size"])
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def bert_int8(name: str) -> Any:
    model = bert(name)
    shape = shape_of(model.config)
    width = layout_of(shape, "fast").num_neurons
    layout = LayerLayout(heavy=int8_part(width, gated=False), light=None, down_bias=True)
    return split_model(model, layout, shape, linears=attention_paths(model, "encoder.layer", BERT_ATTENTION))


def candidates(name: str, device: str, notes: list[str]) -> dict[str, Forward]:
    """What is timed, by name; what cannot run here is said in `notes`."""
    dense = bert(name)
    shape = shape_of(dense.config)
    models: dict[str, Any] = {"dense": dense}
    models["keep .3535"] = bert(name, width=layout_of(shape, "fast").num_neurons)
    if name == "bert-base":
        models["recipe paper"] = split_model(bert(name), layout_of(shape, "paper"), shape)
    models["recipe int8"] = bert_int8(name)
    if device == "cuda":
        models = {key: model.to(device, torch.bfloat16) for key, model in models.items()}
        return {key: _runs(model) for key, model in models.items()}
    made = {key: _runs(model) for key, model in models.items()}
    for key, make in (
        ("torch dynamic int8", _torch_dynamic),
        ("torchao int8", _torchao),
        ("onnxruntime int8", _onnx),
    ):
        try:
            made[key] = make(dense)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes.append(f"{key}: not run here ({type(error).__name__}: {reason[:120]})")
    return made


def _runs(model: Any) -> Forward:
    return lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def _torch_dynamic(dense: Any) -> Forward:
    return _runs(torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, torch.qint8))


def _torchao(dense: Any) -> Forward:
    import copy

    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(dense)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _runs(model)


def _onnx(dense: Any) -> Forward:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from ffsplit.runtime.onnx_export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        plain = export_onnx(Path(folder), Path(folder) / "model.onnx")
        quantize_dynamic(plain, Path(folder) / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(Path(folder) / "int8.onnx"), options)
    return lambda ids: session.run(
        None, {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, dtype=np.int64)}
    )


@torch.inference_mode()
def in_turn(forwards: dict[str, Forward], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round by round, each round beginning with another one."""
    names = list(forwards)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            forwards[name](ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            if number >= 2:  # two rounds of warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def encoder_page(name: str, device: str, *, quick: bool) -> list[str]:
    """The tables of one BERT shape."""
    notes: list[str] = []
    forwards = candidates(name, device, notes)
    shapes = SHAPES[device]
    header = [f"{rows} x {tokens}" for rows, tokens in shapes]
    cells: dict[str, list[str]] = {key: [] for key in forwards}
    for (rows, tokens), title in zip(shapes, header, strict=True):
        ids = torch.randint(1000, 20000, (rows, tokens)).to(device)
        rounds = 2 if quick else 12 if rows * tokens > 512 else 40
        times = in_turn(forwards, ids, rounds)
        for key in forwards:
            ratio = statistics.median(a / b for a, b in zip(times["dense"], times[key], strict=True))
            target = f" (reach {REACH[key, title]})" if (key, title) in REACH else ""
            cells[key].append(f"{statistics.median(times[key]):.1f} ms, {ratio:.2f}x{target}")
    lines = ["| | " + " | ".join(header) + " |", "|---|" + "---|" * len(header)]
    lines += [f"| {key} | " + " | ".join(row) + " |" for key, row in cells.items()]
    first, kept = bert(name), bert(name, width=layout_of(shape_of(bert(name).config), "fast").num_neurons)
    limits = [f"keep .3535 {_limit(first, kept):.3f}x"]
    if name == "bert-base":
        shape = shape_of(first.config)
        limits.append(
            f"recipe paper {_limit(first, split_model(bert(name), layout_of(shape, 'paper'), shape)):.3f}x"
        )
    lines += ["", f"The multiplications that are gone would give at most: {', '.join(limits)}."]
    return lines + [f"- {note}" for note in notes]


def _limit(dense: Any, compressed: Any) -> float:
    return work_of(dense).multiplications / work_of(compressed).multiplications


def decode_page(device: str, *, quick: bool) -> list[str]:
    """A causal model at batch 1: int8 heavy hitters, int4 for the rest, int8 attention."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = transformers.LlamaConfig(**(LLAMA | ({"num_hidden_layers": 2} if quick else {})))
    with quiet_transformers():
        dense = transformers.LlamaForCausalLM(config).to(dtype).to(device).eval()
        shape = shape_of(config, gated=True)
        heavy = shape.num_neurons // 4 // 64 * 64
        layout = LayerLayout(
            heavy=int8_part(heavy, gated=True),
            light=int8_part(shape.num_neurons - heavy, gated=True, format=INT4),
            down_bias=False,
        )
        model = transformers.LlamaForCausalLM(config)
        linears = attention_paths(model, "layers", LLAMA_ATTENTION)
        model = split_model(model, layout, shape, linears=linears).to(dtype).to(device)
    timings = time_models(
        dense, model, shapes=((1, 128),), num_pairs=3 if quick else 10, new_tokens=4 if quick else 64
    )
    lines = ["| | dense p50 | compressed p50 | speed-up | limit | share |", "|---|---|---|---|---|---|"]
    for each in timings:
        reach = " (reach 0.70)" if each.phase == "decode" else ""
        lines.append(
            f"| {each.phase} 1 x {each.num_tokens} | {each.original.p50_ms:.1f} ms "
            f"| {each.compressed.p50_ms:.1f} ms | {each.speedup:.2f}x "
            f"| {each.limit:.2f}x by {each.limited_by} | {each.share_of_limit:.2f}{reach} |"
        )
    return lines


def load_page(*, quick: bool) -> list[str]:
    """Loading an int8 artifact, and a dense checkpoint of as many layers and as many bytes."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        split, dense = Path(folder) / "split", Path(folder) / "dense"
        bert_int8("bert-base").save_pretrained(split)
        size = (split / "model.safetensors").stat().st_size
        blocks = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
        empty = transformers.BertModel(
            transformers.BertConfig(**blocks, vocab_size=1), add_pooling_layer=False
        )
        rest = size - 4 * sum(parameter.numel() for parameter in empty.parameters())
        config = transformers.BertConfig(**blocks, vocab_size=max(rest // (4 * 384), 1))
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(dense)
        times: dict[Path, list[float]] = {split: [], dense: []}
        for _ in range(3 if quick else 9):
            for directory in times:
                start = time.perf_counter()
                model = transformers.AutoModel.from_pretrained(directory)
                times[directory].append(1e3 * (time.perf_counter() - start))
                del model
                gc.collect()
        sizes = [(each / "model.safetensors").stat().st_size / 1e6 for each in times]
    medians = [statistics.median(each) for each in times.values()]
    return [
        "| | bytes | from_pretrained |",
        "|---|---|---|",
        f"| int8 artifact of BERT-base | {sizes[0]:.0f} MB | {medians[0]:.0f} ms |",
        f"| dense checkpoint, 12 layers | {sizes[1]:.0f} MB | {medians[1]:.0f} ms |",
        f"| ratio | | {medians[0] / medians[1]:.2f} (reach 1.2 at most) |",
    ]


def hardware_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=(*BERTS, "decode", "load"), default=[])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--out", type=Path, help="default: benchmarks/speed_<hardware>.md")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if given.threads:
        torch.set_num_threads(given.threads)
    pages = {name: lambda name=name: encoder_page(name, given.device, quick=given.quick) for name in BERTS}
    pages["decode"] = lambda: decode_page(given.device, quick=given.quick)
    pages["load"] = lambda: load_page(quick=given.quick)
    name = hardware_name(given.device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [
        f"# Speed on {name}",
        "",
        f"Made by `PYTHONPATH=. python benchmarks/speed.py {' '.join(sys.argv[1:])}`".rstrip() + ".",
        f"{name}, {torch.get_num_threads()} threads, {given.device}; {versions}.",
        "Weights are random: speed depends on shapes alone. Candidates take turns in one process; times are",
        "medians, speed-ups medians of the ratios to the dense model (float32 on the CPU, bfloat16 on a GPU)",
        "within a round. `rows x tokens`.",
    ]
    for title, page in pages.items():
        if given.only and title not in given.only:
            continue
        start = time.perf_counter()
        lines += ["", f"## {title}", "", *page()]
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        gc.collect()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = given.out or ROOT / "benchmarks" / f"speed_{slug}.md"
    out.write_text("\n".join(lines) + "\n", "utf-8")
    print(out)


if __name__ == "__main__":
    main()
