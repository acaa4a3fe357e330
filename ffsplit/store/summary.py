"""A manifest in about ten lines, as text and as a small table for notebooks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffsplit.store.manifest import Manifest, Measurements

LABEL_WIDTH = 12


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What a reader asks first, as pairs of a label and a value."""
    recipe = [str(manifest.recipe.get("name", "")), *([str(manifest.budget)] if manifest.budget else [])]
    found = [("model", manifest.model.id), ("recipe", ", ".join(recipe))]
    if manifest.measurements is not None:
        found += _measured(manifest.measurements)
    if manifest.plain is not None:
        found.append(("loads with", "transformers alone" if manifest.plain else "import ffsplit first"))
    found += [("run", f"{manifest.run_key}, {manifest.created_at}"), ("at", manifest.uri or "not published")]
    return found


def _measured(measured: Measurements) -> list[tuple[str, str]]:
    before, after = measured.original_size, measured.compressed_size
    found = [
        ("FFNs", f"{_size(before.ffn_bytes)} -> {_size(after.ffn_bytes)}"),
        ("parameters", f"{before.num_parameters:,} -> {after.num_parameters:,}"),
    ]
    if measured.latency:
        largest = max(measured.latency, key=lambda each: each.batch_size * each.num_tokens)
        found.append(
            (
                "speed-up",
                f"{largest.speedup:.2f}x at {largest.batch_size} x {largest.num_tokens} tokens, "
                f"{measured.device}, {measured.dtype}",
            )
        )
    if measured.fidelity:
        figures = (f"{name} {value:.4g}" for name, value in measured.fidelity.items())
        found.append(("fidelity", ", ".join(figures)))
    tasks = (
        f"{each.name} {each.metric} {each.original:.2f} -> {each.compressed:.2f}" for each in measured.tasks
    )
    found.append(("tasks", "; ".join(tasks) or "not scored on a task"))
    return found


def as_text(manifest: Manifest) -> str:
    lines = [f"  {label:<{LABEL_WIDTH}}{value}" for label, value in facts(manifest)]
    return "\n".join([f"Manifest of {_what(manifest)}", *lines])


def as_html(manifest: Manifest) -> str:
    rows = "".join(
        f"<tr><th style='text-align: left'>{html.escape(label)}</th>"
        f"<td style='text-align: left'>{html.escape(value)}</td></tr>"
        for label, value in facts(manifest)
    )
    return f"<table><caption>{_what(manifest)}</caption>{rows}</table>"


class Page(str):
    """An HTML page, which a notebook shows in a frame."""

    def _repr_html_(self) -> str:
        return f"<iframe srcdoc='{html.escape(self)}' style='width: 100%; height: 40em; border: 0'></iframe>"


def _what(manifest: Manifest) -> str:
    return "a compressed model" if manifest.kind == "model" else "neuron statistics"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"
