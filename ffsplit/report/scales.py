"""How good a measure of fidelity is: bands with what they meant for scores in FFSplit's own benchmarks.

The limits and the sentences are from `benchmarks/quality.jsonl`, three seeds of every recipe at four budgets
on STS-B and SST-2, and language models on held-out text. A test compares them with that file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal, NamedTuple

Band = Literal["far", "fair", "close"]
BANDS: Final[tuple[Band, ...]] = ("far", "fair", "close")
"""From the worst to the best, as they are drawn."""


class Scale(NamedTuple):
    """The values at the ends of the bands, from the worst that is drawn to the best that is possible."""

    worst: float
    fair: float
    close: float
    best: float
    lost: str
    most: tuple[float, float]
    """The most that any model lost with a `close` and with at least a `fair` value."""

    def band(self, value: float) -> Band:
        rising = self.best > self.worst
        if value >= self.close if rising else value <= self.close:
            return "close"
        return "fair" if (value >= self.fair if rising else value <= self.fair) else "far"

    def place(self, value: float) -> float:
        """Where a value lies, in percent from the left. Each band is a third."""
        ends = (self.worst, self.fair, self.close, self.best)
        shares = ((value - first) / (last - first) for first, last in pairwise(ends))
        return sum(min(max(share, 0.0), 1.0) for share in shares) * 100 / len(BANDS)

    def meaning(self, name: str) -> str:
        """What the bands of a measure meant, in one sentence."""
        limit = "at least" if self.best > self.worst else "at most"
        return (
            f"models with a {name} of {limit} {self.close:g} (close) {self.lost.format(self.most[0])}, "
            f"those with {limit} {self.fair:g} (fair) at most {self.most[1]:g}"
        )


_POINTS: Final = "lost at most {:g} points on STS-B or SST-2"
_ACCURACY: Final = "lost at most {:g} points of accuracy on SST-2"
_PERPLEXITY: Final = "had at most {:g} % more perplexity"
_COSINE: Final = Scale(0.5, 0.9, 0.95, 1.0, _POINTS, (2.5, 3.8))
SCALES: Final = {
    "pooled_cosine": _COSINE,
    "token_cosine": _COSINE,
    "label_agreement": Scale(0.8, 0.95, 0.98, 1.0, _ACCURACY, (3.1, 5.2)),
    "logit_error": Scale(0.2, 0.05, 0.02, 0.0, _ACCURACY, (1.9, 3.4)),
    "top1_agreement": Scale(0.5, 0.75, 0.85, 1.0, _PERPLEXITY, (8, 18)),
    "kl_divergence": Scale(1.0, 0.2, 0.05, 0.0, _PERPLEXITY, (8, 39)),
}
"""By the name of the measure. Perplexities have none: their change is what counts."""


class ScaleRow(NamedTuple):
    """One measure: its name and value in words, and where it lies on its scale, if it has one."""

    label: str
    value: str
    band: Band | None
    at: float
    ticks: tuple[str, str]
