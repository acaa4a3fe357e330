"""Templates of pages that need nothing but themselves: one look, and everything that users wrote escaped."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ffsplit.report import humanize


def page_template(name: str, **filters: Callable[..., object]) -> Template:
    """A template of this package by its file's name; numbers in it can be written as people read them."""
    environment = Environment(
        loader=PackageLoader("ffsplit", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=humanize.size,
        count=humanize.count,
        exact=lambda value: f"{value:,}",
        percent=humanize.percent,
        number=humanize.number,
        times=humanize.times,
        duration=humanize.duration,
        layout=humanize.layout,
        score=humanize.score,
        **filters,
    )
    return environment.get_template(name)
