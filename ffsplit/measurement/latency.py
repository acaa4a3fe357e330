"""Latency of two models, timed alternately in one process so that drift affects both alike."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffsplit.machine import usable_cores
from ffsplit.models.load import decodes
from ffsplit.models.names import main_inputs
from ffsplit.runtime.modules import DenseLinear, LowRankLinear
from ffsplit.runtime.quantized_linear import QuantizedLinear
from ffsplit.store.benchmark_records import Figures, Timing
from ffsplit.store.manifest import Latency, LoadAverage, Spread

# How much a model's linear layers multiply and read: this limits the speed-up.

FEW_TOKENS = 8
"""With fewer tokens, a product is limited by reading its weights, not by its multiplications."""


class Work(NamedTuple):
    """Multiplications per token, and bytes of weights, of all linear layers."""

    multiplications: int
    weight_bytes: int


def work_of(model: Any) -> Work:
    """The work of a loaded model, dense or split."""
    each = [_of_module(module) for module in model.modules()]
    return Work(sum(work.multiplications for work in each), sum(work.weight_bytes for work in each))


def _of_module(module: nn.Module) -> Work:
    if isinstance(module, QuantizedLinear):
        count = module.num_rows * module.num_columns
        return Work(count, module.size_bytes)
    if isinstance(module, nn.Linear | DenseLinear):
        matrices = [module.weight]
    elif isinstance(module, LowRankLinear):
        matrices = [module.left, module.right]
    elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
        matrices = [module.weight]  # type: ignore[list-item]
    else:
        return Work(0, 0)
    count = sum(matrix.numel() for matrix in matrices)
    return Work(count, sum(matrix.numel() * matrix.element_size() for matrix in matrices))


# Random inputs for timing any model, chosen by the arguments of its forward.


def example_inputs(
    model: Any, *, num_rows: int, num_tokens: int, vocab_size: int | None = None
) -> dict[str, Tensor]:
    """Arguments of a forward pass: `num_tokens` token ids per row, and pictures or sounds.

    Pictures have the size the model is made for. A sound has as many samples as give `num_tokens` frames, or
    as an encoder of fixed length takes. Where the config does not tell sizes, the model's own processor makes
    the inputs from noise. Models that place pictures or sounds among the tokens get none. The same arguments
    give the same inputs.
    """
    names = _argument_names(model)
    generator = torch.Generator().manual_seed(0)
    config, inputs = model.config, {}

    def floats(*shape: int) -> Tensor:
        return torch.randn(num_rows, *shape, generator=generator)

    if "input_ids" in names:
        size = vocab_size or vocab_size_of(model)
        inputs["input_ids"] = torch.randint(size, (num_rows, num_tokens), generator=generator)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    reads_text = "input_ids" in names and main_inputs(model)[0] == "input_ids"
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in names and not (reads_text and not hasattr(model, "get_text_features")):
        sizes, channels = (getattr(vision, name, None) for name in ("image_size", "num_channels"))
        if sizes is None or channels is None:
            inputs |= _processed(model, "image", num_rows=num_rows, generator=generator)
        else:
            height, width = sizes if isinstance(sizes, list | tuple) else (sizes, sizes)
            inputs["pixel_values"] = floats(channels, height, width)
    if "input_values" in names and not reads_text:
        if hasattr(config, "conv_stride"):
            inputs["input_values"] = floats(_num_samples(config, num_frames=num_tokens))
        else:
            inputs |= _processed(model, "sound", num_rows=num_rows, generator=generator)
    if "input_features" in names and not reads_text:
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
            inputs["input_features"] = floats(config.num_mel_bins, 2 * config.max_source_positions)
        else:
            inputs |= _processed(model, "sound", num_rows=num_rows, generator=generator)
    if "decoder_input_ids" in names:
        shape = (num_rows, num_tokens)
        size = getattr(getattr(config, "decoder", None), "vocab_size", None) or vocab_size_of(model)
        inputs["decoder_input_ids"] = torch.randint(size, shape, generator=generator)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
        if name in names
    }


def _processed(
    model: Any, medium: Literal["image", "sound"], *, num_rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """What the processor in a model's folder makes of noise: pictures of 256 pixels, or sounds of 2 s."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    chosen = AutoImageProcessor if medium == "image" else AutoFeatureExtractor
    processor = chosen.from_pretrained(model.name_or_path, local_files_only=True)
    if medium == "image":
        noise = torch.randint(256, (num_rows, 256, 256, 3), generator=generator, dtype=torch.uint8)
        found = processor(images=list(noise.numpy()), return_tensors="pt")
    else:
        rate = processor.sampling_rate
        noise = torch.randn(num_rows, 2 * rate, generator=generator)
        found = processor(list(noise.numpy()), sampling_rate=rate, return_tensors="pt")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _argument_names(model: Any) -> set[str]:
    """The arguments of a model's forward. One that takes **kwargs also takes its family's main input."""
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        names.update(main_inputs(model))
        names |= {"attention_mask"} if "input_ids" in names else set()
    return names


def vocab_size_of(model: Any) -> int:
    """The vocabulary size of a model's text side; 0 if it has none."""
    stated = _stated_vocabulary(model.config)
    return stated or (BYTES if "input_ids" in _argument_names(model) else 0)


def _stated_vocabulary(config: Any) -> int:
    """The vocabulary size in a config, else in its first part that has one; 0 if none has."""
    text = getattr(config, "text_config", config)
    parts = (each for each in vars(text).values() if hasattr(each, "model_type"))
    return int(getattr(text, "vocab_size", 0) or 0) or next(filter(None, map(_stated_vocabulary, parts)), 0)


def _num_samples(config: Any, *, num_frames: int) -> int:
    """Audio samples that the convolutions turn into `num_frames` frames, or a few more."""
    hop = math.prod(map(int, config.conv_stride))
    return hop * (num_frames + sum(map(int, config.conv_kernel)))


BYTES = 256
"""Token ids of models that read characters, whose config states no vocabulary."""

WARM_UP_RUNS = 3
FEWEST_PAIRS = 6
"""Fewer have no 99 % confidence interval."""
MOST_ROUNDS = 4
"""If noise could decide a gate, at most this many times the usual pairs are timed."""
CONFIDENCE = 0.99
NUM_RESAMPLES = 4000

Shape = tuple[int, int]


@torch.inference_mode()
def paired_latency(
    original: Any,
    compressed: Any,
    *,
    shapes: Sequence[Shape],
    num_pairs: int,
    limits: Sequence[tuple[Shape | None, float]] = (),
    example: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> tuple[Latency, ...]:
    """p50 and p95 of forward passes of random inputs at each (rows, tokens per row).

    With `example`, of the inputs that it makes of a number of rows, whatever their tokens are.
    Times `num_pairs` pairs; more if the speed-up is so close to one of its `limits` (each for one shape, or
    all) that noise could decide the gate.
    """
    with batches_allowed(original, compressed):
        return tuple(
            _at_shape(
                original,
                compressed,
                shape,
                num_pairs=num_pairs,
                limits=[limit for where, limit in limits if where in (None, shape)],
                example=example,
            )
            for shape in shapes
        )


@contextmanager
def batches_allowed(*models: Any) -> Iterator[None]:
    """Let causal classifiers without a padding token run batches without padding, in this context."""
    without = [model for model in models if getattr(model.config, "pad_token_id", None) is None]
    for model in without:
        model.config.pad_token_id = vocab_size_of(model)
    try:
        yield
    finally:
        for model in without:
            model.config.pad_token_id = None


def _at_shape(
    original: Any,
    compressed: Any,
    shape: Shape,
    *,
    num_pairs: int,
    limits: Sequence[float],
    example: Callable[[int], Mapping[str, Tensor]] | None,
) -> Latency:
    rows, tokens = shape
    if example is None:
        vocab_size = min(map(vocab_size_of, (original, compressed)))
        inputs: Mapping[str, Tensor] = example_inputs(
            original, num_rows=rows, num_tokens=tokens, vocab_size=vocab_size
        )
    else:
        inputs = example(rows)
        ids = [inputs[name] for name in ("input_ids", "decoder_input_ids") if name in inputs]
        tokens = ids[0].shape[1] if ids else tokens

    def timed(count: int) -> NDArray[np.float64]:
        return paired_times(
            lambda: original(**inputs),
            lambda: compressed(**inputs),
            num_pairs=count,
            on_cuda=original.device.type == "cuda",
        )

    times = timed(num_pairs)
    more = max(num_pairs, FEWEST_PAIRS)
    for _ in range(MOST_ROUNDS - 1):
        if all(spread_of(times).decides(limit) for limit in limits):
            break
        times = np.concatenate([times, timed(more)])
    p50, p95 = np.percentile(times, 50, axis=0), np.percentile(times, 95, axis=0)
    return Latency(
        batch_size=rows,
        num_tokens=tokens,
        original_p50_ms=p50[0],
        original_p95_ms=p95[0],
        compressed_p50_ms=p50[1],
        compressed_p95_ms=p95[1],
        original_tokens_per_s=rows * tokens / p50[0] * 1e3,
        compressed_tokens_per_s=rows * tokens / p50[1] * 1e3,
        speedup=p50[0] / p50[1],
        spread=spread_of(times),
        num_pairs=len(times),
    )


def spread_of(times: NDArray[np.float64]) -> Spread:
    """Confidence interval of the ratio of the medians of [pairs, 2] times. Deterministic.

    It is a bootstrap over pairs, so a disturbance that slows both calls of a pair has no effect. Source:
    Efron, Bootstrap methods: another look at the jackknife, 1979.
    """
    p10, p90 = (float(each) for each in np.percentile(times[:, 0] / times[:, 1], [10, 90]))
    if len(times) < FEWEST_PAIRS:
        return Spread(p10=p10, p90=p90, low=None, high=None)
    drawn = np.random.default_rng(0).integers(len(times), size=(NUM_RESAMPLES, len(times)))
    medians = np.median(times[drawn], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(each) for each in np.percentile(medians[:, 0] / medians[:, 1], [tail, 100 - tail]))
    return Spread(p10=p10, p90=p90, low=low, high=high)


def load_average() -> float | None:
    """The system's load average over the last minute; None if the system has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def load_since(before: float | None) -> LoadAverage | None:
    """The load before and now, and the CPUs that this process may run on."""
    after = load_average()
    if before is None or after is None:
        return None
    return LoadAverage(before=round(before, 2), after=round(after, 2), num_cpus=usable_cores())


def paired_times(
    first: Callable[[], Any], second: Callable[[], Any], *, num_pairs: int, on_cuda: bool
) -> NDArray[np.float64]:
    """Milliseconds of two calls, made alternately after a warm-up: [num_pairs, 2]."""
    for _ in range(WARM_UP_RUNS):
        run_ms(first, on_cuda=on_cuda)
        run_ms(second, on_cuda=on_cuda)
    times = np.empty((num_pairs, 2))
    for pair in range(num_pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[pair, which] = run_ms((first, second)[which], on_cuda=on_cuda)
    return times


def run_ms(call: Callable[[], Any], *, on_cuda: bool) -> float:
    """Milliseconds that a call takes, including its work on the GPU."""
    start = time.perf_counter()
    call()
    if on_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


# Two models, timed alternately over a grid of batch sizes and lengths; causal models by prefill and decode.

Phase = Literal["forward", "prefill", "decode"]


@torch.inference_mode()
def time_models(
    original: Any, compressed: Any, *, shapes: Sequence[tuple[int, int]], num_pairs: int, new_tokens: int
) -> tuple[Timing, ...]:
    """Timings at each (rows, tokens per row); causal language models also decode `new_tokens` tokens."""
    with batches_allowed(original, compressed):
        return tuple(_timings((original, compressed), shapes, num_pairs=num_pairs, new_tokens=new_tokens))


def _timings(
    models: tuple[Any, Any], shapes: Sequence[tuple[int, int]], *, num_pairs: int, new_tokens: int
) -> Iterator[Timing]:
    in_phases = new_tokens > 0 and decodes(models[0])
    vocab_size = min(map(vocab_size_of, models))
    for rows, tokens in shapes:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (rows, tokens), generator=generator).to(models[0].device)
        mask = torch.ones_like(ids)
        calls = [_forward(model, ids, mask) for model in models]
        times = paired_times(*calls, num_pairs=num_pairs, on_cuda=ids.is_cuda)
        phase: Phase = "prefill" if in_phases else "forward"
        yield _timing(phase, times, models, rows=rows, tokens=tokens, tokens_a_call=rows * tokens)
        if in_phases:
            steps = [_decoder(model, ids) for model in models]
            times = paired_times(*steps, num_pairs=new_tokens, on_cuda=ids.is_cuda)
            yield _timing("decode", times, models, rows=rows, tokens=tokens, tokens_a_call=rows)


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids, attention_mask=mask)


def _decoder(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Each call decodes one more token after those in the cache. Which token does not matter here."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    token = ids[:, -1:]
    return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)


def _timing(
    phase: Phase, times: NDArray[np.float64], models: Any, *, rows: int, tokens: int, tokens_a_call: int
) -> Timing:
    before, after = (work_of(model) for model in models)
    by_bytes = tokens_a_call < FEW_TOKENS
    which = 1 if by_bytes else 0
    limit = before[which] / max(after[which], 1)
    original, compressed = (_figures(times[:, model], tokens_a_call) for model in (0, 1))
    speedup = original.p50_ms / compressed.p50_ms
    return Timing(
        phase=phase,
        batch_size=rows,
        num_tokens=tokens,
        original=original,
        compressed=compressed,
        speedup=speedup,
        spread=spread_of(times),
        limit=limit,
        limited_by="bytes" if by_bytes else "multiplications",
        share_of_limit=speedup / limit,
        num_pairs=len(times),
    )


def _figures(times_ms: NDArray[np.float64], tokens_a_call: int) -> Figures:
    p50, p95, p99 = (float(np.percentile(times_ms, percent)) for percent in (50, 95, 99))
    return Figures(p50_ms=p50, p95_ms=p95, p99_ms=p99, tokens_per_s=tokens_a_call / p50 * 1e3)
