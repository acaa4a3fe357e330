"""The GPU's tables of the speed page. Models run as they are served: compiled, or replayed as CUDA graphs."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers
from speed_models import bert, bert_kept, bert_paper, llama, llama_int8, llama_kept, llama_split
from speed_peers import Forward
from speed_turns import in_turn, ratio
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ffsplit.measurement.latency import work_of
from ffsplit.models.load import quiet_transformers
from ffsplit.runtime.cuda_graphs import use_cuda_graphs

COMPILED_SHAPE, REPLAYED_SHAPES = (32, 512), ((32, 128), (8, 128))
PROMPT_TOKENS, CACHE_TOKENS = 2048, 4096
BATCHES = (1, 16)
KEEP = 0.5
ROUNDS = {False: 40, True: 2}
REACH = {
    ("keep .3535", "32 x 512"): 1.52,
    ("recipe paper", "32 x 512"): 1.25,
    ("keep .3535", "32 x 128"): 1.25,
    ("keep .3535", "8 x 128"): 1.25,
    ("split", "prefill"): 1.2,
    ("keep .5, int8", "prefill"): 1.2,
}
WARM_UPS = 3
COMPILED: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": {"comprehensive_padding": False}}
"""Without padding, which makes torch copy a bias to every row first where a width is not a multiple of 64."""
WHOLE_ROWS = "sdpa_whole_rows"


def compiled(model: Any) -> Forward:
    """Forward passes of an encoder over rows that are whole: no mask, which flash attention does not take.

    transformers makes one when it is compiled, and torch's attention is then in float32, by three kernels.
    """
    model.set_attn_implementation(WHOLE_ROWS)
    run = torch.compile(model.forward, **COMPILED)
    replays: dict[torch.Size, Callable[[], Any]] = {}

    def forward(ids: torch.Tensor) -> Any:
        if ids.shape not in replays:
            replays[ids.shape] = captured(lambda: run(input_ids=ids))
        return replays[ids.shape]()

    return forward


@torch.inference_mode()
def compiled_decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Each call reads one more token into a static cache, as `generate` does it with one."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # which packs 4-bit weights, too
    token, positions = ids[:, -1:].clone(), torch.full_like(ids[:, -1:], ids.shape[1])
    run = torch.compile(model.forward, **COMPILED)
    return captured(
        lambda: run(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)
    )


@torch.inference_mode()
def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """What a call launches, to be launched again at once. Its inputs are the tensors that it has now."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def encoder_table(name: str, *, quick: bool) -> list[str]:
    """Forward passes of one BERT shape: compiled at a large batch, and by graphs alone at smaller ones."""
    makers = {"dense": bert, "keep .3535": bert_kept, "recipe paper": bert_paper}
    models = {key: make(name).to("cuda", torch.bfloat16) for key, make in makers.items()}
    columns = {}
    for rows, tokens in REPLAYED_SHAPES:
        ids = torch.randint(1000, 20000, (rows, tokens), device="cuda")
        plain = {key: _reads(model, ids) for key, model in models.items()}
        columns[f"{rows} x {tokens}, as transformers runs it"] = in_turn(plain, ROUNDS[quick])
    for model in models.values():
        use_cuda_graphs(model)
        model.set_attn_implementation(WHOLE_ROWS)
    for rows, tokens in REPLAYED_SHAPES:
        ids = torch.randint(1000, 20000, (rows, tokens), device="cuda")
        replayed = {key: _reads(model, ids) for key, model in models.items()}
        columns[f"{rows} x {tokens}, CUDA graphs"] = in_turn(replayed, ROUNDS[quick])
    for model in models.values():
        del model.forward
    ids = torch.randint(1000, 20000, COMPILED_SHAPE, device="cuda")
    calls = {key: _call(compiled(model), ids) for key, model in models.items()}
    columns = {"32 x 512, compiled": in_turn(calls, ROUNDS[quick])} | columns
    return _page(columns)


def causal_table(*, quick: bool) -> list[str]:
    """A 7B Llama's shape, fewer layers: plain, in int8, and split in int8 and int4 with int8 attention."""
    options = {"num_layers": 2} if quick else {}
    with quiet_transformers():
        models = {
            "dense": llama("cuda", **options),
            "keep .5": llama_kept("cuda", keep=KEEP, **options),
            "keep .5, int8": llama_int8("cuda", keep=KEEP, **options),
            "split": llama_split("cuda", **options),
        }
    models = {key: model.bfloat16() for key, model in models.items()}
    dense_bytes = work_of(models["dense"]).weight_bytes
    limits = {key: dense_bytes / work_of(model).weight_bytes for key, model in models.items()}
    ids = torch.randint(1000, 20000, (1, PROMPT_TOKENS), device="cuda")
    prefills = {key: _prefill(model, ids) for key, model in models.items()}
    columns = {f"prefill of {PROMPT_TOKENS:,} tokens": in_turn(prefills, 2 if quick else 12)}
    for rows in BATCHES:
        prompts = torch.randint(1000, 20000, (rows, 128), device="cuda")
        steps = {key: compiled_decode(model, prompts) for key, model in models.items()}
        columns[f"decode, batch {rows}"] = in_turn(steps, ROUNDS[quick])
        steps = None
        torch._dynamo.reset()
        gc.collect()
    lines = [*_page(columns), "", "Decoding, limits by the bytes of weights that are gone:"]
    for key, limit in list(limits.items())[1:]:
        shares = [f"{ratio(columns[f'decode, batch {rows}'], 'dense', key) / limit:.2f}" for rows in BATCHES]
        lines.append(
            f"- {key}: {limit:.2f}x at most, of which {' and '.join(shares)} are reached (reach 0.75)"
        )
    return lines


def _page(columns: dict[str, dict[str, list[float]]]) -> list[str]:
    first = next(iter(columns.values()))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for key in first:
        cells = []
        for title, times in columns.items():
            found = [reach for (row, words), reach in REACH.items() if row == key and words in title]
            target = f" (reach {found[0]})" if found and "transformers" not in title else ""
            cells.append(f"{statistics.median(times[key]):.2f} ms, {ratio(times, 'dense', key):.2f}x{target}")
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return lines


def _reads(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    mask = torch.ones_like(ids)
    return lambda: model(input_ids=ids, attention_mask=mask)


def _call(forward: Forward, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: forward(ids)


def _prefill(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)


transformers.AttentionInterface.register(WHOLE_ROWS, sdpa_attention_forward)
transformers.AttentionMaskInterface.register(WHOLE_ROWS, lambda *_, **__: None)
