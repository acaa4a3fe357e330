"""The recipes that come with the package."""

from __future__ import annotations

from importlib import resources


def shipped_recipes() -> dict[str, str]:
    """The YAML text of every recipe in the package, by name."""
    files = (each for each in resources.files(__name__).iterdir() if each.name.endswith(".yaml"))
    texts = {each.name.removesuffix(".yaml"): each.read_text("utf-8") for each in files}
    return dict(sorted(texts.items()))
