"""Models on a GPU as they are served there: compiled, and replayed as one CUDA graph, without launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from speed_peers import Forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CACHE_TOKENS = 1024
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


transformers.AttentionInterface.register(WHOLE_ROWS, sdpa_attention_forward)
transformers.AttentionMaskInterface.register(WHOLE_ROWS, lambda *_, **__: None)
