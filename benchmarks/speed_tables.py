"""The CPU's tables of the speed page: encoders, a causal model's prefill and decode, loading."""

from __future__ import annotations

import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from speed_models import bert, bert_int8, bert_kept, bert_paper, llama, llama_split
from speed_peers import (
    ENCODER_PEERS,
    ENGINES,
    SLOW_ONES,
    Forward,
    causal_peers,
    encoder_peers,
    made_where_it_runs,
    runs,
)
from speed_turns import in_turn, ratio
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from ffsplit.machine import multiplies_bfloat16
from ffsplit.measurement.latency import work_of
from ffsplit.models.load import quiet_transformers

SHAPES = ((8, 128), (1, 128), (1, 16))
REACH = {
    ("keep .3535", "8 x 128"): "1.65",
    ("recipe int8", "8 x 128"): "4.5",
    ("recipe int8", "1 x 128"): "3",
    ("recipe int8", "1 x 16"): "3",
}
INT8_PEERS = ("torch dynamic int8", *ENGINES)
MAKERS = {"dense": bert, "keep .3535": bert_kept, "recipe paper": bert_paper, "recipe int8": bert_int8}
COMPILED = ("dense", "keep .3535", "recipe int8")
PROMPT_TOKENS = 128


@inductor.patch(freezing=True)
@dynamo.patch(recompile_limit=64)  # several models of one class
def encoder_table(name: str, *, quick: bool) -> list[str]:
    """Forward passes of one BERT shape, as fast as each candidate makes them."""
    notes: list[str] = []
    models = {key: make(name) for key, make in MAKERS.items()}
    limits = {key: work_of(models["dense"]).multiplications / work_of(models[key]).multiplications
              for key in ("keep .3535", "recipe paper")}  # fmt: skip
    forwards = {key: runs(model) for key, model in models.items()} | _in_bfloat16(name, notes)
    peers = [each for each in ENCODER_PEERS if name == "bert-base" or each not in SLOW_ONES]
    forwards |= encoder_peers(models["dense"], notes, names=peers)
    served = encoder_peers(models["keep .3535"], [], names=ENGINES)
    forwards |= {f"keep .3535 by {engine}": forward for engine, forward in served.items()}
    columns: dict[str, dict[str, list[float]]] = {}
    for rows, tokens in SHAPES:
        ids = torch.randint(1000, 20000, (rows, tokens))
        calls = {key: _call(forward, ids) for key, forward in forwards.items()}
        num_rounds = 2 if quick else 12 if rows * tokens > 512 else 40
        columns[f"{rows} x {tokens}"] = in_turn(calls, num_rounds)
    titles = [f"{title}, {len(times['dense'])} rounds" for title, times in columns.items()]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(columns)]
    for key in forwards:
        cells = []
        for title, times in columns.items():
            target = f" (reach {REACH[key, title]})" if (key, title) in REACH else ""
            cells.append(f"{statistics.median(times[key]):.1f} ms, {ratio(times, 'dense', key):.2f}x{target}")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    first = next(iter(columns.values()))
    lines += ["", f"At {next(iter(columns))}, limits by the multiplications that are gone:"]
    for key, limit in limits.items():
        share = ratio(first, "dense", key) / limit
        lines.append(
            f"- {key}: {limit:.3f}x at most, of which {share:.2f} is reached"
            + " (reach 0.80)" * (key == "recipe paper")
        )
    for engine in served:
        ours = f"keep .3535 by {engine}"
        gains = [f"{ratio(times, engine, ours):.2f}x at {title}" for title, times in columns.items()]
        lines.append(f"- {ours} over the dense model by {engine}: {', '.join(gains)}")
    reach = f"reach {limits['keep .3535']:.2f}, which the neurons left give, at 8 and 1 x 128"
    for ours in (each for each in ("recipe int8", _compiled("recipe int8")) if each in forwards):
        for peer in (each for each in INT8_PEERS if each in forwards):
            gains = [f"{ratio(times, peer, ours):.2f}x at {title}" for title, times in columns.items()]
            lines.append(f"- {ours} over the dense model by {peer}: {', '.join(gains)} ({reach})")
    return lines + [f"- {note}" for note in notes]


def _in_bfloat16(name: str, notes: list[str]) -> dict[str, Forward]:
    """The same models in bfloat16 where the processor multiplies it, and compiled, for any shape at once."""
    made: dict[str, Forward] = {}
    dtype = torch.bfloat16 if multiplies_bfloat16("cpu") else torch.float32
    if dtype == torch.bfloat16:
        made |= {f"{key}, bfloat16": runs(MAKERS[key](name).to(dtype)) for key in COMPILED}
    notes.append(f"compiled: torch.compile(model, dynamic=True) with TORCHINDUCTOR_FREEZING=1, in {dtype}")
    for key in COMPILED:
        made_where_it_runs(_compiled(key), partial(_compile, MAKERS[key](name).to(dtype)), made, notes)
    return made


def _compiled(key: str) -> str:
    return f"{key}, compiled"


def _compile(model: Any) -> Forward:
    forward = runs(torch.compile(model, dynamic=True))
    batches = [torch.ones(shape, dtype=torch.long) for shape in SHAPES]
    with torch.inference_mode():
        for batch in batches:
            forward(batch)
    return forward


def _call(forward: Forward, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: forward(ids)


def causal_table(*, quick: bool) -> list[str]:
    """A causal model at batch 1: int8 heavy hitters, int4 for the rest, int8 attention."""
    notes: list[str] = []
    num_layers = 2 if quick else None
    with quiet_transformers():
        models = {
            "dense": llama("cpu", num_layers=num_layers),
            "split": llama_split("cpu", num_layers=num_layers),
        }
    limit = work_of(models["dense"]).weight_bytes / work_of(models["split"]).weight_bytes
    models |= causal_peers(models["dense"], notes)
    ids = torch.randint(1000, 20000, (1, PROMPT_TOKENS))
    prefill = in_turn({key: _prefill(model, ids) for key, model in models.items()}, 2 if quick else 8)
    decode = in_turn({key: _decode(model, ids) for key, model in models.items()}, 4 if quick else 48)
    lines = [f"| | prefill of {PROMPT_TOKENS} tokens | decode, a token |", "|---|---|---|"]
    for key in models:
        cells = [
            f"{statistics.median(t[key]):.1f} ms, {ratio(t, 'dense', key):.2f}x" for t in (prefill, decode)
        ]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    share = ratio(decode, "dense", "split") / limit
    lines += [
        "",
        f"- decode: the bytes that are gone would give {limit:.2f}x at most, of which {share:.2f} is reached "
        "(reach 0.70)",
    ]
    return lines + [f"- {note}" for note in notes]


def _prefill(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids, use_cache=True)


@torch.inference_mode()
def _decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Each call reads one more token, after what the cache holds."""
    cache, token = model(input_ids=ids, use_cache=True).past_key_values, ids[:, -1:]
    return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)


def load_table(*, quick: bool) -> list[str]:
    """Loading an int8 artifact, and a dense checkpoint of as many layers and as many bytes."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        split, dense = Path(folder) / "split", Path(folder) / "dense"
        bert_int8("bert-base").save_pretrained(split)
        _save_dense(dense, size=(split / "model.safetensors").stat().st_size)
        times: dict[Path, list[float]] = {split: [], dense: []}
        for _ in range(3 if quick else 21):
            for directory in times:
                times[directory].append(_load_ms(directory))
        sizes = [(each / "model.safetensors").stat().st_size / 1e6 for each in times]
    medians = [statistics.median(each) for each in times.values()]
    return [
        "| | bytes | from_pretrained |",
        "|---|---|---|",
        f"| int8 artifact of BERT-base | {sizes[0]:.0f} MB | {medians[0]:.0f} ms |",
        f"| dense checkpoint, 12 layers | {sizes[1]:.0f} MB | {medians[1]:.0f} ms |",
        f"| ratio | | {medians[0] / medians[1]:.2f} (reach 1.2 at most) |",
        "",
        "As in a process that has loaded nothing before: transformers compiles a pattern for every tensor.",
    ]


def _save_dense(directory: Path, *, size: int) -> None:
    """A dense BERT of 12 layers, with as many embeddings as make up the bytes."""
    fields = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    empty = transformers.BertModel(transformers.BertConfig(**fields, vocab_size=1), add_pooling_layer=False)
    rest = size - 4 * sum(parameter.numel() for parameter in empty.parameters())
    config = transformers.BertConfig(**fields, vocab_size=max(rest // (4 * 384), 1))
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(directory)


def _load_ms(directory: Path) -> float:
    gc.collect()
    re.purge()
    start = time.perf_counter()
    transformers.BertModel.from_pretrained(directory, add_pooling_layer=False)
    return 1e3 * (time.perf_counter() - start)
