"""Numbers formatted for people: three significant digits, a unit, and a non-breaking space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ffsplit.ffn.shapes import Dense, FFNShape, Integer, LayerLayout, LowRank, PartLayout
from ffsplit.store.manifest import ExpertsRecord, Latency, LeftOutFFNs, LoadAverage, Spread

SPACE: Final = "\u00a0"
MINUS: Final = "\u2212"
TIMES: Final = "\u00d7"

_BYTES: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNTS: Final = ("", "k", "M", "B", "T")


def number(value: float) -> str:
    """Three significant digits and never an exponent. From 0.99 to 1: four decimals, rounded down.

    A cosine of 0.99996 must not read as 1.00.
    """
    if 0.99 <= abs(value) < 1:
        text = f"{math.floor(abs(value) * 1e4) / 1e4:.4f}"
    else:
        rounded = abs(float(f"{value:.3g}"))
        decimals = 0 if rounded == 0 else max(0, 2 - math.floor(math.log10(rounded)))
        text = f"{rounded:,.{min(decimals, 12)}f}" if rounded < 1000 else f"{abs(value):,.0f}"
    return MINUS + text if value < 0 else text


def _scaled(value: float, *, units: tuple[str, ...]) -> str:
    """`value` in the largest unit (steps of 1000) that keeps the number at 1 or more."""
    if abs(value) < 1000:
        text = str(int(value)) if float(value).is_integer() else number(value)
        return text + SPACE + units[0] if units[0] else text
    rounded = float(f"{value:.3g}")
    step = min(math.floor(math.log10(abs(rounded)) / 3), len(units) - 1)
    return number(rounded / 1000**step) + SPACE + units[step]


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 90.9 MB."""
    return _scaled(num_bytes, units=_BYTES)


def count(value: float) -> str:
    """A count: 812, 22.7 M."""
    return _scaled(value, units=_COUNTS)


def percent(share: float) -> str:
    """A fraction of 1 as a percentage."""
    return number(share * 100) + SPACE + "%"


def change(before: float, *, after: float) -> str:
    """The signed change from `before` to `after`, in percent of `before`."""
    if before == 0 or after == before:
        return "unchanged" if after == before else "from nothing"
    share = (after - before) / before
    return ("+" if share > 0 else MINUS) + percent(abs(share))


def times(ratio: float) -> str:
    """A speed-up: 1.71x, with a multiplication sign."""
    return number(ratio) + TIMES


def milliseconds(value: float) -> str:
    return number(value) + SPACE + "ms"


def score(value: float) -> str:
    """A task's score: two decimals from 10 on, as papers print percentages; four decimals below."""
    text = f"{abs(value):,.{2 if abs(value) >= 10 else 4}f}"
    return MINUS + text if value < 0 else text


def score_change(before: float, *, after: float) -> str:
    """The signed change of a score, in its own unit: the difference of the rounded values."""
    decimals = 2 if max(abs(before), abs(after)) >= 10 else 4
    text = f"{abs(round(after, decimals) - round(before, decimals)):,.{decimals}f}"
    return text if not text.strip("0.,") else ("+" if after > before else MINUS) + text


def duration(seconds: float) -> str:
    """A stage's wall time: 820 ms, 12.3 s, 4 min 12 s, 3 h 5 min."""
    if seconds < 1:
        return number(round(seconds * 1000)) + SPACE + "ms"
    if round(seconds) < 60:
        return number(seconds) + SPACE + "s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def shape(batch_size: int, *, num_tokens: int) -> str:
    """Rows, and tokens per row, of one forward pass: 8 x 128, with a multiplication sign."""
    return f"{batch_size}{SPACE}{TIMES}{SPACE}{num_tokens}"


def unit(ffns: Iterable[tuple[str, int]]) -> str:
    """ "layer" if each of these FFNs is the only one of its layer, else "FFN"."""
    return "layer" if all(name == f"layer {number}" for name, number in ffns) else "FFN"


def layout(layer: LayerLayout) -> str:
    """One layer's layout in words: its width, the rank of factors, the bits of integers; or dropped."""
    if layer.is_dense:
        return f"width {layer.num_neurons:,}"
    return " + ".join(_part(part) for part in layer.parts) or "dropped"


LEAST_GIVEN_UP: Final = 0.0005
"""Of all elements of FFNs. Less is not reported."""


def given_up_in_words(keep: float | None, *, unrounded: float | None) -> str:
    """What a budget gave up to rounding widths and ranks; empty if it is nothing."""
    if keep is None or unrounded is None or unrounded - keep < LEAST_GIVEN_UP:
        return ""
    return f"rounding widths gave up {unrounded - keep:.4f} of the {unrounded:.4f} that the budget allows"


def rounding_in_words(
    layouts: Sequence[LayerLayout], shapes: Sequence[FFNShape], *, keep: float, unrounded: float
) -> str | None:
    """One line on the widths of FFNs that were rounded to multiples; None if nothing was given up."""
    if not (given_up := given_up_in_words(keep, unrounded=unrounded)):
        return None
    pairs = dict.fromkeys(zip(layouts, shapes, strict=True))
    widths = [f"{layout(each)} of {shape.num_neurons:,}" for each, shape in pairs if not each.is_dropped]
    more = f" and {len(widths) - 3} more" if len(widths) > 3 else ""
    return f"{', '.join(widths[:3])}{more} neurons: keep {keep:.4f}; {given_up} (--width-multiple 1 uses it)"


def _part(part: PartLayout) -> str:
    if part.is_dense:
        return f"{part.num_neurons:,} dense"
    formats = [each for each in (part.up, part.gate, part.down) if each and not isinstance(each, Dense)]
    names = dict.fromkeys(_format(each) for each in formats)
    return f"{part.num_neurons:,} at {' / '.join(names)}"


def _format(format: LowRank | Integer) -> str:
    if isinstance(format, LowRank):
        return f"rank {format.rank:,}"
    groups = "" if format.group_size is None else f" in groups of {format.group_size:,}"
    return f"int{format.num_bits}{groups}"


# The noise of timings, in words.

NOISY_TAIL: Final = 1.5
"""Timings are reported as noisy if p95 / p50 is above this."""


def spread_in_words(of: Spread | None) -> str:
    """The 10th to the 90th percentile of single pairs; empty if it was not recorded."""
    return "" if of is None else f"{number(of.p10)} to {times(of.p90)}"


def noise(latency: Sequence[Latency], load: LoadAverage | None) -> str | None:
    """Signs of noise in the timings, in one line; None if there are none."""
    tails = {
        f"at {shape(each.batch_size, num_tokens=each.num_tokens)} tokens the {name}'s": p95 / p50
        for each in latency
        for name, p50, p95 in (
            ("original", each.original_p50_ms, each.original_p95_ms),
            ("compressed model", each.compressed_p50_ms, each.compressed_p95_ms),
        )
    }
    return described(tails, load)


def described(tails: dict[str, float], load: LoadAverage | None) -> str | None:
    """The longest tail (p95 / p50, by model and shape), and a load above the number of CPUs."""
    found = list(_disturbances(tails, load))
    return f"timings are noisy: {'; '.join(found)}" if found else None


def _disturbances(tails: dict[str, float], load: LoadAverage | None) -> Iterator[str]:
    whose, longest = max(tails.items(), key=lambda tail: tail[1], default=("", 0.0))
    if longest > NOISY_TAIL:
        yield f"{whose} p95 is {number(longest)} times its p50"
    if load is not None and max(load.before, load.after) > load.num_cpus:
        yield f"the CPUs were overloaded, {load_in_words(load)}"


def load_in_words(load: LoadAverage) -> str:
    cpus = f"{load.num_cpus} CPU{'' if load.num_cpus == 1 else 's'}"
    return f"load average {load.before:.2f} before and {load.after:.2f} after, on {cpus}"


def unchanged_in_words(left_out: Sequence[LeftOutFFNs], *, ffn_elements: int) -> str:
    """The FFNs that a run leaves unchanged, and the share of the others; "" if there are none.

    `ffn_elements` are those of the FFNs that it compresses.
    """
    if not left_out:
        return ""
    parts = []
    for each in left_out:
        of_tower = f" of the {each.tower}" if each.tower else ""
        noun = "FFN" if each.num_ffns == 1 else "FFNs"
        parts.append(f"{each.num_ffns} {noun}{of_tower}, since {each.reason}")
    share = ffn_elements / (ffn_elements + sum(each.num_elements for each in left_out))
    others = f"the others, {percent(share)} of all FFN elements"
    return f"Left unchanged: {'; '.join(parts)}. The budget applies to {others}."


MOST_DROPPED: Final = 32
"""Maximum number of dropped experts that are named in one line; the manifest lists all."""


def dropped_in_words(experts: ExpertsRecord) -> str:
    """How many experts of each block are left, and which were dropped."""
    left = f"Experts left: {experts.num_kept} of {experts.num_experts} per block"
    num_named = MOST_DROPPED // (experts.num_experts - experts.num_kept)
    named = [f"{each.block} without {', '.join(map(str, each.experts))}" for each in experts.dropped]
    if len(named) > num_named:
        named = [*named[:num_named], "the manifest lists all that were dropped"]
    return f"{left} ({'; '.join(named)})."
