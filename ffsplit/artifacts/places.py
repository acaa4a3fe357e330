"""Local paths in documents: by name alone, so that nothing of the machine is published with a model."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from ffsplit.home import home_directory

_LOCAL = re.compile(r"(?:^|:)(~?/.*)", re.DOTALL)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class _JsonRecord(Protocol):
    def model_dump_json(self) -> str: ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Any: ...


AnyRecord = TypeVar("AnyRecord", bound=_JsonRecord)


def by_name(record: AnyRecord, *, given: Iterable[str | None]) -> AnyRecord:
    """A pydantic record in which a local path is its last name.

    `given` are paths, and what has them after a colon as in `sts:/data/pairs.csv`. What lies in their
    folders, the home directory, this one or that of temporary files goes by its path from there. Relative
    paths and URIs of stores stay.
    """
    paths = {path for each in given if each for path in _paths(each)}
    folders = {path.rpartition("/")[0] + "/" for path in paths}
    folders |= {f"{folder}/" for folder in (home_directory(), Path.cwd(), tempfile.gettempdir()) if folder}
    found = {_in_json(path): _in_json(path.rpartition("/")[2]) for path in paths if path.count("/") == 1}
    found |= {_in_json(folder): "" for folder in folders if folder.strip("/")}
    if not found:
        return record
    longest_first = "|".join(re.escape(path) for path in sorted(found, key=len, reverse=True))
    text = record.model_dump_json()
    named = re.sub(rf"(?<![\w.~/-])(?:{longest_first})", lambda match: found[match[0]], text)
    return record if named == text else cast(AnyRecord, type(record).model_validate_json(named))


def _paths(given: str) -> Iterator[str]:
    """The absolute path in what a flag was given: as it stands there, and where it leads."""
    given = given.removeprefix("file://")
    match = None if _SCHEME.match(given) else _LOCAL.search(given)
    if match is not None:
        path = "/" + match[1].strip("/") if match[1].startswith("/") else match[1].rstrip("/")
        yield path
        yield os.path.realpath(os.path.expanduser(path))


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
