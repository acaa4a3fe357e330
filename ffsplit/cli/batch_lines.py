"""What the command line prints of a batch."""

from __future__ import annotations

from ffsplit.cli.columns import print_sentence
from ffsplit.measurement.gates import describe_result
from ffsplit.report.humanize import change, duration, number, size, spread_in_words, times
from ffsplit.zoo.batch import (
    INDEX_NAME,
    STATES,
    Batch,
    BatchModel,
    Figures,
    batch_key,
    describe_promotion,
    headline,
    slowest,
)
from ffsplit.zoo.forecast import BatchForecast


def print_batch(batch: Batch, *, destination: str) -> None:
    """One line per model and per failed gate, and where the batch's documents are."""
    for model in batch.models:
        print_sentence(f"{model.name}: {STATES[model.state]}{_facts(model)}")
        if model.less_memory is not None:
            print_sentence(f"  it ran out of memory, then ran {model.less_memory}")
        for result in model.result.gates if model.result else ():
            if not result.met:
                print_sentence(f"  {describe_result(result)}")
        if model.promotion is not None:
            print_sentence(f"  {describe_promotion(model.promotion)}")
            for result in model.promotion.gates:
                if not result.met:
                    print_sentence(f"  {describe_result(result)}")
    published = batch.count("published", "committed already")
    interrupted = batch.count("interrupted")
    print_sentence(
        f"{published} of {len(batch.models)} published ({batch.count('published')} now), "
        f"{batch.count('refused')} refused by gates, {batch.count('failed')} failed"
        + (f", {interrupted} interrupted" if interrupted else "")
        + (f", {promoted} now in use" if (promoted := batch.moved("promoted")) else "")
    )
    if batch.price is not None:
        print(f"cost: {batch.price:.4g}, by the zoo file's prices")
    print(f"batch: {destination}/{batch_key(batch.id)}")
    print(f"index: {destination}/{INDEX_NAME}")


def print_forecast(found: BatchForecast) -> None:
    """One line per model: what a batch would do with it, why, and what that would cost."""
    for model in found.models:
        line = f"{model.name}: {model.action}: {', '.join(model.reasons)}"
        print(f"{line}{_cost(model.seconds, model.cost.price if model.cost else None)}")
    running = found.count("run")
    print(f"would run {running} of {len(found.models)}{_cost(found.seconds, found.price)}")
    print("dry run, nothing was written")


def _cost(seconds: float | None, price: float | None) -> str:
    parts = [] if seconds is None else [f"about {duration(seconds)} here".replace("\u00a0", " ")]
    parts += [] if price is None else [f"cost about {price:.3g}"]
    return f" ({', '.join(parts)})" if parts else ""


def _facts(model: BatchModel) -> str:
    if model.result is None or model.result.figures is None:
        return f": {model.error}" if model.error else ""
    figures = model.result.figures
    facts = [f"{size(figures.size_bytes[1])} ({change(figures.size_bytes[0], after=figures.size_bytes[1])})"]
    speedup, fidelity = slowest(figures), headline(figures)
    facts += [] if speedup is None else [f"speed-up {times(speedup)}{_spread(figures, speedup)}"]
    facts += [] if fidelity is None else [f"fidelity {number(fidelity)}"]
    facts += [] if figures.noise is None else [figures.noise.replace("\u00a0", " ")]
    return f", {', '.join(facts)}"


def _spread(figures: Figures, speedup: float) -> str:
    """The spread at the shape that has this speed-up."""
    shape = next(shape for shape, each in figures.speedups.items() if each == speedup)
    return f" ({spread_in_words(figures.spreads[shape])})" if shape in figures.spreads else ""
