"""The sources of a run's text and their shares, one of which may be the model itself.

A source is one `--calibration SPEC[:SHARE]`. `self:` is text that the model writes: run/stages/generate.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ffsplit.calibration.sampling import CalibrationSettings, TextSample, joined, sample_texts
from ffsplit.errors import ConfigError

OWN = "self"
_NUMBER = r"\d*\.\d+|[01]"
_SHARE = re.compile(rf"(?P<spec>.+?):(?P<share>{_NUMBER})", re.DOTALL)
_OWN = re.compile(
    rf"self:((?P<amount>\d+(\.\d+)?(?=[KMG])|\d\d+)(?P<unit>[KMG]?)(:(?P<share>{_NUMBER}))?|(?P<only>{_NUMBER}))?",
    re.IGNORECASE,
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
OWN_FORMS = "self:, self:4M (tokens) or self:0.5 (its share)"
HALF = 0.5
"""The share of the model's own text, if `self:` stands beside other sources without saying how much."""


class Source(NamedTuple):
    """One source, the share of the rows that it was given, and for `self:` the number of tokens."""

    spec: str
    share: float | None = None
    num_tokens: int | None = None

    @property
    def is_own(self) -> bool:
        return self.spec == f"{OWN}:"


class OwnRows(NamedTuple):
    """How many rows the model writes itself, of each part of the sample."""

    calibration: int = 0
    validation: int = 0
    held_out: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def parse_source(given: str) -> Source:
    """A source as `--calibration` names it. Raises ConfigError for a share outside (0, 1]."""
    if given.startswith(f"{OWN}:"):
        return _parse_own(given)
    match = _SHARE.fullmatch(given)
    return Source(given) if match is None else Source(match["spec"], _share(match["share"], given))


def _parse_own(given: str) -> Source:
    match = _OWN.fullmatch(given)
    if match is None:
        raise ConfigError(f"--calibration {given}: write {OWN_FORMS}")
    number = match["share"] or match["only"]
    share = None if number is None else _share(number, given)
    if match["amount"] is None:
        return Source(f"{OWN}:", share)
    num_tokens = int(float(match["amount"]) * _UNITS[match["unit"].upper()])
    if num_tokens < 1:
        raise ConfigError(f"--calibration {given}: the model is to write no token: write {OWN_FORMS}")
    return Source(f"{OWN}:", share, num_tokens)


def without_share(given: str) -> str:
    """An argument without the share at its end, if it has one."""
    match = _SHARE.fullmatch(given)
    return given if match is None else match["spec"]


def _share(text: str, given: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise ConfigError(f"--calibration {given}: a share is above 0 and at most 1")
    return share


def specs_of(calibration: Sequence[str]) -> tuple[str, ...]:
    """The sources that can be read, without their shares."""
    return tuple(source.spec for source in map(parse_source, calibration) if not source.is_own)


class Mixture(NamedTuple):
    """The sources to read, their shares if any was given, and the model's own share or number of tokens.

    `shares` are of the rows that are read. `own_share` is of all rows.
    """

    specs: tuple[str, ...]
    shares: tuple[float, ...] | None
    own_share: float = 0.0
    own_tokens: int | None = None
    is_named: bool = False
    """Whether `self:` was given, and is not merely the recipe's default."""

    @property
    def has_own(self) -> bool:
        return self.own_share > 0 or self.own_tokens is not None

    def allowed(self, settings: CalibrationSettings) -> CalibrationSettings:
        """The settings with room for the number of tokens that `self:` names, whatever the recipe reads."""
        if self.own_tokens is None or settings.max_tokens is None:
            return settings
        room = None if self.own_share else settings.max_tokens + self.own_tokens
        return settings.model_copy(update={"max_tokens": room})

    def without_own(self) -> Mixture:
        """The sources that are read, alone."""
        return self._replace(own_share=0.0, own_tokens=None)


def parse_mixture(calibration: Sequence[str], *, own_share: float) -> Mixture:
    """The sources and their shares. `own_share` holds if neither `self:` nor a share was given.

    Sources without a share divide what the others leave. Raises ConfigError if shares do not add up to 1.
    """
    sources = [parse_source(given) for given in calibration]
    own = [source for source in sources if source.is_own]
    if len(own) > 1:
        raise ConfigError("--calibration: name self: once")
    others = [source for source in sources if not source.is_own]
    specs = tuple(source.spec for source in others)
    if all(source.share is None for source in sources):
        if not own:
            return Mixture(specs, None, own_share)
        (source,) = own
        if source.num_tokens is not None:
            return Mixture(specs, None, 0.0 if others else 1.0, source.num_tokens, is_named=True)
        return Mixture(specs, None, HALF if others else 1.0, is_named=True)
    shares = _completed([source.share for source in sources])
    of_own = sum(share for source, share in zip(sources, shares, strict=True) if source.is_own)
    of_others = [share for source, share in zip(sources, shares, strict=True) if not source.is_own]
    read = tuple(share / sum(of_others) for share in of_others)
    num_tokens = own[0].num_tokens if own else None
    return Mixture(specs, read if len(read) > 1 else None, of_own, num_tokens, is_named=bool(own))


def _completed(shares: Sequence[float | None]) -> list[float]:
    """Every source's share. Raises ConfigError unless they add up to 1."""
    given = sum(share for share in shares if share is not None)
    num_open = sum(share is None for share in shares)
    if (num_open and given >= 1) or (not num_open and abs(given - 1) > 1e-6):
        fix = "leave room for the others" if num_open else "or add self: for the rest"
        raise ConfigError(f"--calibration: the shares add up to {given:.4g}, not 1: change them, {fix}")
    return [(1 - given) / num_open if share is None else share for share in shares]


class Drawn(NamedTuple):
    """The rows that were drawn from the sources, and how many the model is to write beside them."""

    sample: TextSample
    own: OwnRows


def draw(
    mixture: Mixture,
    texts: Sequence[Sequence[str]],
    *,
    settings: CalibrationSettings,
    seed: int,
    num_validation: int,
) -> Drawn:
    """Draw rows from the texts of each source, by their shares.

    Without shares, sources are one text after the other. A larger share than a source has rows for makes
    the sample smaller; raises ConfigError if that contradicts a number of tokens in `self:`.
    """
    most = settings.most_rows
    if not mixture.specs:
        rows = most if mixture.own_tokens is None else _rows(mixture.own_tokens, settings)
        held_out = max(1, min(settings.held_out, settings.held_out_tokens // settings.row_length))
        own = OwnRows(rows, min(num_validation, held_out), held_out)
        return Drawn(TextSample.empty(), own)
    share = mixture.own_share
    if mixture.own_tokens is not None and share:
        own_rows = _rows(mixture.own_tokens, settings)
        read = round(own_rows * (1 - share) / share)
    else:
        own_rows = 0 if mixture.own_tokens is None else _rows(mixture.own_tokens, settings)
        read = settings.samples if not share else max(1, int((1 - share) * most))
    sample = _sample(mixture, texts, num_rows=read, settings=settings, seed=seed, validation=num_validation)
    drawn = len(sample.calibration)
    if mixture.own_tokens is not None and share and drawn < read:
        most_tokens = int(drawn * share / (1 - share)) * settings.row_length
        raise ConfigError(
            f"--calibration: the sources have {drawn:,} of the {read:,} rows that their share asks for "
            f"beside self: give self:{most_tokens}, or another share"
        )
    if mixture.own_tokens is None and share:
        own_rows = round(drawn * share / (1 - share))
    ratio = own_rows / drawn
    validation = min(num_validation, round(len(sample.validation) * ratio) or 1) if num_validation else 0
    return Drawn(sample, OwnRows(own_rows, validation) if own_rows else OwnRows())


def _rows(num_tokens: int, settings: CalibrationSettings) -> int:
    return max(1, num_tokens // settings.row_length)


def _sample(
    mixture: Mixture,
    texts: Sequence[Sequence[str]],
    *,
    num_rows: int,
    settings: CalibrationSettings,
    seed: int,
    validation: int,
) -> TextSample:
    shares = mixture.shares
    if shares is None:
        together = [text for source in texts for text in source]
        return sample_texts(
            together,
            num_samples=num_rows,
            num_held_out=settings.held_out,
            seed=seed,
            num_validation=validation,
        )
    parts = [
        sample_texts(
            source,
            num_samples=max(1, round(share * num_rows)),
            num_held_out=max(1, round(share * settings.held_out)),
            seed=seed,
            num_validation=validation and max(1, round(share * validation)),
        )
        for source, share in zip(texts, shares, strict=True)
    ]
    total = min(len(part.calibration) / share for part, share in zip(parts, shares, strict=True))
    cut = [
        part.first(max(1, round(share * total)), held_out=len(part.held_out), validation=len(part.validation))
        for part, share in zip(parts, shares, strict=True)
    ]
    return joined(cut)
