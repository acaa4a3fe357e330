"""A headless browser, if one is installed."""

from __future__ import annotations

import html
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
_LOOK = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inside = frame.contentDocument;
  const wide = [inside.documentElement, ...inside.querySelectorAll(".scroll, .tile, .tile p")];
  document.title = wide.filter(each => each.scrollWidth > each.clientWidth + 1)
    .map(each => `${each.tagName} ${each.className}: ${each.textContent.trim().slice(0, 40)}`).join("; ");
};
"""


def dom_of(page: str, folder: Path) -> str:
    """The page's HTML after its scripts ran."""
    file = folder / "shown.html"
    file.write_text(page, "utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/user"]
    return subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, check=True
    ).stdout


def sideways(page: str, folder: Path, *, width: int) -> str:
    """What would have to be scrolled sideways, or leaves its tile, in a window of this width."""
    frame = (
        f'<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
    )
    shown = dom_of(f"<title>not seen</title>{frame}<script>{_LOOK}</script>", folder)
    return html.unescape(shown.partition("<title>")[2].partition("</title>")[0])
