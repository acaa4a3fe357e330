"""What mkdocs does not do by itself: pages outside docs/, links to files, the command-line reference."""

from __future__ import annotations

import argparse
import html
import logging
import posixpath
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ffsplit.cli.entry import build_parser

LOG = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[2]
NAMED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
PLACES = ("benchmarks/*.md", "cluster/*.md", "cluster/*/*.md")
COMMANDS = "<!-- every command -->"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
LIST = re.compile(r"^(?![-*|\s]|\d+\.)(.+)\n(?=(?:[-*]|\d+\.) )", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def _elsewhere() -> dict[str, str]:
    """The pages outside docs/: what they are called on the site, by their path in the repository.

    Files without a title are parts of other pages.
    """
    places = sorted(path for place in PLACES for path in ROOT.glob(place))
    found = [path.relative_to(ROOT).as_posix() for path in places if path.read_text("utf-8").startswith("# ")]
    return NAMED | {path: path.replace("README.md", "index.md") for path in found}


SITE_OF = _elsewhere()
REPOSITORY_OF = {site: path for path, site in SITE_OF.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and list in `nav` whatever its patterns stand for."""
    for path, site in SITE_OF.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    files.append(
        File.generated(config, "assets/extra.css", abs_src_path=str(Path(__file__).with_name("extra.css")))
    )
    pages = sorted(file.src_uri for file in files.documentation_pages())
    config.nav = _expanded(config.nav, pages, listed=_listed(config.nav))
    return files


def _listed(nav: Any) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav
    return {page for part in parts for page in _listed(part)}


def _expanded(nav: Any, pages: list[str], *, listed: set[str]) -> Any:
    if isinstance(nav, str):
        return nav
    if isinstance(nav, dict):
        return {title: _expanded(part, pages, listed=listed) for title, part in nav.items()}
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            entries += [page for page in pages if fnmatch(page, entry) and page not in listed]
            listed |= set(entries)
        else:
            entries.append(_expanded(entry, pages, listed=listed))
    return entries


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that are right in the repository to the same page, or a copy of the file, on the site."""
    here = page.file.src_uri
    source = REPOSITORY_OF.get(here, f"docs/{here}")

    def lead(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        if (ROOT / path).is_dir():
            path += "/README.md"
        if not (ROOT / path).is_file():
            LOG.warning("%s links to %s, which does not exist", source, match["path"])
            return match[0]
        target = SITE_OF.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (match["anchor"] or "")

    kept: list[str] = []

    def put_aside(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    markdown = LINK.sub(lead, CODE.sub(put_aside, markdown))
    markdown = LIST.sub(r"\1\n\n", markdown)  # a list may follow a line of text at once on a forge
    markdown = re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], markdown)
    return markdown.replace(COMMANDS, "\n".join(_commands(build_parser())))


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    """Each command with its flags, as the parser has them."""
    lines: list[str] = []
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        about = str(command.description)
        lines += [f"### ffsplit {name}", "", about[0].upper() + about[1:] + ".", ""]
        lines += ["| argument | |", "|---|---|"]
        for action in command._actions:
            if not {"-h", "--debug"} & set(action.option_strings):
                lines.append(f"| {_spelled(action)} | {_explained(action)} |")
        lines.append("")
    return lines


def _spelled(action: argparse.Action) -> str:
    values = [action.metavar] if isinstance(action.metavar, str) else list(action.metavar or ())
    if action.choices is not None and not values:
        values = ["{" + ",".join(map(str, action.choices)) + "}"]
    if not action.option_strings:
        return _code(values[0] if values else action.dest)
    if action.nargs == 0:
        values = []
    elif not values:
        values = [action.dest.upper()]
    return _code(" ".join([*action.option_strings, *values]) + (" ..." if action.nargs in ("+", "*") else ""))


def _explained(action: argparse.Action) -> str:
    required = "required; " if action.required and action.option_strings else ""
    return required + html.escape(action.help or "").replace("|", "&#124;").replace("*", "&#42;")


def _code(text: str) -> str:
    return "<code>" + html.escape(text).replace("|", "&#124;").replace("*", "&#42;") + "</code>"
