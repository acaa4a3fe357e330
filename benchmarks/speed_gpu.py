"""Models on a GPU as they are used there: compiled, and replayed without the time that launches take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from speed_peers import Forward

CACHE_TOKENS = 1024
COMPILED: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}


def compiled(model: Any) -> Forward:
    """Forward passes of an encoder."""
    run = torch.compile(model.forward, **COMPILED)

    def forward(ids: torch.Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # models take turns: none is the other's next step
        return run(input_ids=ids)

    return forward


@torch.inference_mode()
def compiled_decode(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Each call reads one more token into a static cache, as `generate` does it with one."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # which packs 4-bit weights, too
    token, positions = ids[:, -1:].clone(), torch.full_like(ids[:, -1:], ids.shape[1])
    run = torch.compile(model.forward, **COMPILED)

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return run(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)

    return step
