"""A matplotlib figure as inline SVG: the same bytes every time, text as text, colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK: Final = "#000001"
MUTED: Final = "#000002"
GRID: Final = "#000003"
BEFORE: Final = "#000004"
AFTER: Final = "#000005"

_PAGE_COLORS: Final = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
}
"""Stand-ins drawn with, and the page's variables they become: so one figure serves light and dark."""

_DEPTH: Final = (
    (46, 125, 209),
    (107, 104, 214),
    (168, 86, 196),
    (207, 77, 138),
    (214, 90, 72),
    (190, 117, 24),
)
"""First to last layer. All of one middling lightness, so that each stands out from white and from black."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ffsplit",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "path.simplify": False,
}
_UNITS_PER_INCH: Final = 72
_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def depth_colors(num_layers: int) -> list[str]:
    """One colour a layer, evenly along the ramp."""
    last = len(_DEPTH) - 1
    colors = []
    for layer in range(num_layers):
        position = layer / max(1, num_layers - 1) * last
        start = min(int(position), last - 1)
        mix = position - start
        pairs = zip(_DEPTH[start], _DEPTH[start + 1], strict=True)
        colors.append("#" + "".join(f"{round(low + (high - low) * mix):02x}" for low, high in pairs))
    return colors


def render_svg(
    draw: Callable[[Figure], None], *, width: float, height: float, name: str, title: str, description: str
) -> str:
    """Let `draw` fill a figure of `width` x `height` CSS pixels and return it as an <svg> element.

    `name` prefixes every id, so that figures share a page. `title` and `description` are read aloud.
    A reader's own matplotlib settings have no effect.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width / _UNITS_PER_INCH, height / _UNITS_PER_INCH), dpi=_UNITS_PER_INCH)
        figure.patch.set_visible(False)
        draw(figure)
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return _inline(buffer.getvalue(), name=name, title=title, description=description)


def add_axes(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes between four distances in pixels, counted from the figure's left and top."""
    width, height = (side * _UNITS_PER_INCH for side in figure.get_size_inches())
    axes = figure.add_axes(
        (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
    )
    axes.patch.set_visible(False)
    axes.tick_params(length=0, pad=6)
    return axes


def add_canvas(figure: Figure) -> Axes:
    """Bare axes over the whole figure, in pixels from the top left."""
    width, height = (side * _UNITS_PER_INCH for side in figure.get_size_inches())
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return axes


def _inline(document: str, *, name: str, title: str, description: str) -> str:
    """Leave out what a page does not need (prolog, namespaces, leaking styles), add the text read aloud."""
    opening = re.search(r'<svg\b[^>]*viewBox="([^"]+)"[^>]*>', document)
    assert opening is not None, "matplotlib wrote no viewBox"
    body = document[opening.end() :]
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", body)
    body = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)
    for stand_in, variable in _PAGE_COLORS.items():
        body = body.replace(stand_in, variable)
    lines = "\n".join(line.rstrip() for line in body.strip().splitlines() if line.strip())
    labels = f'<title id="{name}-title">{escape(title)}</title>\n'
    labels += f'<desc id="{name}-desc">{escape(description)}</desc>'
    start = f'<svg class="plot" viewBox="{opening[1]}" role="img" aria-labelledby="{name}-title {name}-desc">'
    return f"{start}\n{labels}\n{lines}\n"
