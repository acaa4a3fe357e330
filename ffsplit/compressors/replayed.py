"""Many equal steps on a GPU, replayed from a CUDA graph: small fits are limited by their launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

EAGER_STEPS = 3
"""Steps before the capture: the first ones allocate an optimizer's state, and choose kernels."""


def repeat(step: Callable[[], None], *, times: int) -> None:
    """Call a step so many times. It may change only tensors on the GPU, and must not wait for the GPU.

    What differs from step to step it must read from such tensors, since all but the first steps are replays.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(min(times, EAGER_STEPS)):
            step()
    current.wait_stream(side)
    if times <= EAGER_STEPS:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):  # not `torch.cuda.graph`, which waits for all streams and frees memory
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    current.wait_stream(side)
    for _ in range(times - EAGER_STEPS):
        graph.replay()
    torch.cuda.current_stream().synchronize()  # the graph and its memory end here
