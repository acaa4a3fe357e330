"""Perplexity of a decoder whose FFNs have few bits, beside other tools at the same bytes.

    python benchmarks/split.py MODEL --text corpus/train.txt --prose corpus/heldout.txt

All FFNs are rounded, nothing else, and all methods calibrate on the same windows of --text. Perplexities
are of windows that no method saw: --prose, Python's documentation, and source of the standard library. Each
method adds a line to --results; one that is there already is not run again. A peer that is not installed is
left out. The results are printed as a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from split_peers import PEERS
from torch import Tensor

from ffsplit.compressors import QuantizeCompressor
from ffsplit.compressors.layer import compress_layer
from ffsplit.ffn.activations import activation_named
from ffsplit.ffn.shapes import FFNShape, LayerLayout
from ffsplit.ffn.weights import FFNPart, FFNWeights, LinearMap
from ffsplit.recipes.recipe import load_recipe

SHIPPED = load_recipe("split").after_healing
assert SHIPPED is not None
COARSER = SHIPPED.model_copy(update={"heavy_fraction": 0.085, "group_size": 64})
OURS: dict[str, QuantizeCompressor] = {
    "rounded to nearest, groups of 64": QuantizeCompressor(num_bits=4, group_size=64),
    "rounded to nearest, groups of 32": QuantizeCompressor(num_bits=4, group_size=32),
    ".08 heavy, groups of 64, rounded to nearest": COARSER.model_copy(update={"method": "rtn"}),
    "GPTQ, no heavy hitters, groups of 64": COARSER.model_copy(update={"heavy_fraction": 0.0}),
    "GPTQ, no heavy hitters, groups of 32": SHIPPED.model_copy(update={"heavy_fraction": 0.0}),
    "GPTQ, .08 heavy, groups of 64": COARSER,
    "GPTQ, .11 heavy, groups of 128": SHIPPED.model_copy(update={"heavy_fraction": 0.115, "group_size": 128}),
    "`split`: GPTQ, .02 heavy, groups of 32": SHIPPED,
}
SOURCES = ("argparse", "tarfile", "subprocess", "shutil", "inspect", "statistics", "typing", "pickle")


def windows(tokenizer: Any, text: str, *, number: int, size: int) -> Tensor:
    ids = tokenizer(text[: 8 * number * size])["input_ids"]
    return torch.tensor(ids[: len(ids) // size * size]).view(-1, size)[:number]


def spread_windows(tokenizer: Any, text: str, *, number: int, size: int) -> Tensor:
    """Windows that begin at even distances all over a text."""
    starts = (len(text) * index // number for index in range(number))
    rows = [tokenizer(text[start : start + 8 * size])["input_ids"][5 : 5 + size] for start in starts]
    return torch.tensor([row for row in rows if len(row) == size])


def scored(tokenizer: Any, prose: Path, *, number: int, size: int) -> dict[str, Tensor]:
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = {
        "prose": prose.read_text("utf-8"),
        "documentation": "\n\n".join(topics[name] for name in sorted(topics)),
        "source": "\n".join((library / f"{name}.py").read_text("utf-8") for name in SOURCES),
    }
    return {name: windows(tokenizer, text, number=number, size=size) for name, text in texts.items()}


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(row[None].to(model.device)).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, row[1:].to(model.device), reduction="sum")
        total += loss.double().cpu()
    return math.exp(float(total) / (rows.shape[0] * (rows.shape[1] - 1)))


@torch.no_grad()
def ffn_inputs(model: Any, rows: Tensor) -> list[list[Tensor]]:
    """What each FFN sees, a matrix [T, D] per window."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0][0].clone()))
        for block, kept in zip(model.model.layers, seen, strict=True)
    ]
    for row in rows:
        model.model(row[None].to(model.device))
    for hook in hooks:
        hook.remove()
    return seen


def ffn_of(mlp: Any, activation: Any) -> FFNWeights:
    up, gate, down = (
        LinearMap.dense(each.weight.detach().float()) for each in (mlp.up_proj, mlp.gate_proj, mlp.down_proj)
    )
    neurons = torch.arange(len(up.weight))
    return FFNWeights(FFNPart(neurons, up, gate, down), None, None, activation)


@torch.no_grad()
def quantized(model: Any, step: QuantizeCompressor, inputs: list[list[Tensor]]) -> tuple[Any, float]:
    """A copy of the model with its FFNs on the grids of `step`, and their bytes as a share of bfloat16's."""
    made, stored, whole = copy.deepcopy(model), 0, 0
    activation = activation_named(model.config.hidden_act)
    for block, seen in zip(made.model.layers, inputs, strict=True):
        ffn = ffn_of(block.mlp, activation)
        num_neurons, hidden = ffn.parts[0].up.weight.shape
        shape = FFNShape(
            num_neurons=num_neurons, hidden_size=hidden, gated=True, up_bias=False, down_bias=False
        )
        layout = step.plan(LayerLayout.dense(shape), shape=shape, budget=shape.num_elements)
        assert layout is not None
        layer = compress_layer(
            ffn,
            heavy_neurons=range(num_neurons),
            layout=layout,
            steps=[step],
            inputs=[torch.cat(seen).float()],
        )
        for part in layer.weights.parts:
            neurons = part.neurons.to(block.mlp.up_proj.weight.device)
            assert part.gate is not None
            block.mlp.up_proj.weight[neurons] = part.up.weight.to(made.dtype)
            block.mlp.gate_proj.weight[neurons] = part.gate.weight.to(made.dtype)
            block.mlp.down_proj.weight[:, neurons] = part.down.weight.to(made.dtype)
        stored, whole = stored + layout.size_bytes(shape, 2), whole + 2 * shape.num_elements
    return made, stored / whole


def methods(
    model: Any, tokenizer: Any, rows: Tensor
) -> Iterator[tuple[str, Callable[[], tuple[Any, float]]]]:
    """Each method that is asked for, as a function that returns a model and its FFNs' share of bytes."""
    inputs: list[list[Tensor]] = []

    def ours(step: QuantizeCompressor) -> tuple[Any, float]:
        inputs.extend(ffn_inputs(model, rows) if not inputs else [])
        return quantized(model, step, inputs)

    yield "dense", lambda: (model, 1.0)
    for name, step in OURS.items():
        yield name, lambda step=step: ours(step)  # type: ignore[misc]
    for name, peer in PEERS.items():
        yield name, lambda peer=peer: peer(copy.deepcopy(model), tokenizer, rows)  # type: ignore[misc]


def table(records: list[dict[str, Any]]) -> str:
    """The results as a table, with perplexities as multiples of the dense model's."""
    (dense,) = (each["perplexity"] for each in records if each["method"] == "dense")
    lines = ["| FFNs | bits per weight | of bfloat16 | " + " | ".join(dense) + " | all | s |"]
    lines.append("|---|---|---|" + "---|" * (len(dense) + 2))
    for each in records:
        ratios = [each["perplexity"][text] / dense[text] for text in dense]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        cells = [f"{ratio:.4f}" for ratio in (*ratios, mean)]
        if each["method"] == "dense":
            cells = [*(f"{perplexity:.2f}" for perplexity in dense.values()), ""]
        size = [f"{each['bits']:.2f}", f"1/{16 / each['bits']:.2f}"]
        lines.append("| " + " | ".join([each["method"], *size, *cells, f"{each['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("out/split.jsonl"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=32, help="of each text that is scored")
    parser.add_argument("--size", type=int, default=1024, help="tokens per window")
    parser.add_argument("--only", default="", help="methods with this in their names")
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).to(given.device).eval()
    rows = spread_windows(
        tokenizer, given.text.read_text("utf-8"), number=given.calibration_windows, size=given.size
    )
    texts = scored(tokenizer, given.prose, number=given.windows, size=given.size)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    done = given.results.read_text("utf-8").splitlines() if given.results.is_file() else []
    finished = {json.loads(line)["method"] for line in done}
    for name, make in methods(model, tokenizer, rows):
        if (given.only not in name and name != "dense") or name in finished:
            continue
        start = time.monotonic()
        try:
            made, share = make()
            made.to(given.device)  # some tools leave it on the CPU
        except ImportError as error:
            print(f"{name}: not installed ({error})", flush=True)
            continue
        except Exception as error:  # of whatever kind a tool raises where it cannot run
            print(f"{name}: failed ({type(error).__name__}: {str(error)[:300]})", flush=True)
            continue
        seconds = time.monotonic() - start
        found = {text: perplexity(made, rows_of) for text, rows_of in texts.items()}
        record = {"method": name, "bits": 16 * share, "seconds": round(seconds, 1), "perplexity": found}
        record |= {"device": given.device, "calibration_tokens": rows.numel(), "windows": given.windows}
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    print(table([json.loads(line) for line in given.results.read_text("utf-8").splitlines()]))


if __name__ == "__main__":
    main()
