"""The one place that keeps credentials out of everything that is shown or stored.

Two things are removed from a text: the values of this process's credentials, in every form that a library
may quote them in, and everything that looks like a credential (passwords and signatures in links,
`Authorization` headers, header values that an HTTP library quotes when it refuses them).

This process's credentials are: environment variables whose names suggest one, the contents of files that
such a variable (or a library's default) names, and passwords in variables that are links. Values that are
too short or too common are kept: otherwise every `1` or `true` in a text would be removed.

It is applied where text leaves the process: to errors as they are made, to standard output and standard
error, and to written documents.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import quote, quote_plus, unquote

STARS = "***"
SHORTEST, SHORTEST_PIECE, LONG = 6, 8, 24
"""Minimum length of a value, of one word of a value with blanks, and of a prefix that identifies a value."""
MAX_FILE_BYTES = 1 << 16

_NAMED_LIKE_ONE = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"
    r"|SIGNING_?KEY|AUTHORIZATION|BEARER|COOKIE|HEADERS|CONNECTION_?STRING"
    r"|(?:^|_)(?:PASS|PAT|SAS|DSN|AUTH|KEY|SIG|SIGNATURE)$",
    re.IGNORECASE,
)
_NAMES_A_FILE = re.compile(r"_(?:FILE|PATH)$", re.IGNORECASE)
_NAMES_SOMETHING_ELSE = re.compile(r"_(?:DIR|MODE|SOCK|EXPIRATION|TIMEOUT|TYPE|NAME)$", re.IGNORECASE)
_DEFAULT_FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "AWS_CONFIG_FILE": "~/.aws/config",
    "HF_TOKEN_PATH": "~/.cache/huggingface/token",
    "RAY_AUTH_TOKEN_PATH": "~/.ray/auth_token",
    "NETRC": "~/.netrc",
}
_ORDINARY = frozenset({"default", "disabled", "enabled", "required", "optional", "anonymous", "standard"})
_IN_A_FILE = re.compile(
    r"""(?:^|[{,])\s*["']?[\w.-]*(?:token|secret|password|access_key|private_key)[\w.-]*["']?\s*[=:]\s*["']?([^"'\n]+)"""
    r"|\bpassword\s+(\S+)",
    re.IGNORECASE | re.MULTILINE,
)
_PASSWORD_IN_LINK = re.compile(r"://([^/\s@\"'<>]+)@")

_QUOTED = (
    r"""\*{3}|b?'(?:[^'\\\n]|\\.)*'|b?"(?:[^"\\\n]|\\.)*"|b?\\"(?:[^"\\\n]|\\[^"\n])*\\"|[^\s"',;}\]]+"""
)
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), replacement)
    for pattern, replacement in (
        (_PASSWORD_IN_LINK.pattern, rf"://{STARS}@"),
        (
            r"((?:[?&]|&amp;|\\u0026)(?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig"
            r"|awsaccesskeyid|(?:access_|auth_)?token|api_?key|key|password|secret)=)[^&\s\"'<>\\]+",
            rf"\g<1>{STARS}",
        ),
        (rf"(header values?:?\s+)(?:{_QUOTED})", rf"\g<1>{STARS}"),
        (r"(\baws4-hmac-sha256\s+credential=)[^\n\"']*", rf"\g<1>{STARS}"),
        (
            r"(\b(?:proxy-)?authorization|\b(?:set-)?cookie|\bx-amz-security-token|\bx-(?:api-key|auth-token))"
            rf"(\\?[\"']?\s*[:=]\s*)(?:(?:bearer|basic|token)\s+[^\s\"',;]+|{_QUOTED})",
            rf"\g<1>\g<2>{STARS}",
        ),
        (r"(\bbearer\s+)[^\s\"',;<>]{8,}", rf"\g<1>{STARS}"),
        (r"(\bbasic\s+)(?=[a-z]*[0-9+/=])[a-z0-9+/]{8,}=*", rf"\g<1>{STARS}"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", STARS),
        (r"\b(?-i:AKIA|ASIA)(?-i:[A-Z0-9]{16})\b|\bhf_[a-z0-9]{20,}\b|\bgh[pousr]_[a-z0-9]{30,}\b", STARS),
        (r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+", STARS),
    )
)


def redacted(text: str) -> str:
    """Replace credentials in a text by stars."""
    known = _Known.of(_credentials())
    for form in known.whole:
        text = text.replace(form, STARS)
    for pattern in known.patterns:
        text = pattern.sub(STARS, text)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


class _JsonRecord(Protocol):
    def model_dump_json(self) -> str: ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Any: ...


AnyRecord = TypeVar("AnyRecord", bound=_JsonRecord)


def without_credentials(record: AnyRecord) -> AnyRecord:
    """A pydantic record with all its text redacted."""
    text = record.model_dump_json()
    clean = redacted(text)
    return record if clean == text else cast(AnyRecord, type(record).model_validate_json(clean))


# This process's credentials


class _Known:
    """Search patterns for every form of some values."""

    def __init__(self, values: frozenset[str]) -> None:
        forms = {form for value in values for form in _forms(value)}
        self.whole = sorted((form for form in forms if len(form) >= 2 * SHORTEST), key=len, reverse=True)
        short = "|".join(sorted(re.escape(form) for form in forms if len(form) < 2 * SHORTEST))
        begun = "|".join(sorted({re.escape(form[:LONG]) for form in self.whole if len(form) > LONG}))
        self.patterns = []
        if begun:  # a truncated value
            self.patterns.append(re.compile(rf"(?:{begun})[^\s\"'<>&,;\\]*"))
        if short:  # not inside a word
            self.patterns.append(re.compile(rf"(?<![\w-])(?:{short})(?![\w-])"))

    @staticmethod
    @lru_cache(maxsize=4)
    def of(values: frozenset[str]) -> _Known:
        return _Known(values)


def _forms(value: str) -> Iterator[str]:
    """A value as it is and as libraries quote it, and each long word of a value with blanks."""
    pieces = [piece for piece in re.split(r"[^\x21-\x7e]+", value) if len(piece) >= SHORTEST_PIECE]
    for part in {value.strip(), unquote(value).strip(), *pieces}:
        encoded = part.encode("utf-8", "surrogatepass")
        yield from (
            form
            for form in (
                part,
                repr(part)[1:-1],
                ascii(part)[1:-1],
                repr(encoded)[2:-1],
                encoded.decode("latin-1"),
                json.dumps(part)[1:-1],
                json.dumps(part, ensure_ascii=False)[1:-1],
                quote(encoded),
                quote(encoded, safe=""),
                quote_plus(encoded),
                html.escape(part),
            )
            if len(form.strip()) >= SHORTEST
        )


def _credentials() -> frozenset[str]:
    """The values of all credentials in environment variables, and in the files they name."""
    found = [value for name, value in os.environ.items() for value in _in_variable(name, value)]
    for name, path in _DEFAULT_FILES.items():
        found += _in_file(os.environ.get(name) or path)
    if home := os.environ.get("HF_HOME"):
        found += _in_file(f"{home}/token")
    return frozenset(value for value in found if _is_telling(value))


def _in_variable(name: str, value: str) -> Iterator[str]:
    for match in _PASSWORD_IN_LINK.finditer(value):
        user, colon, password = match[1].partition(":")
        yield password if colon else user
    if not _NAMED_LIKE_ONE.search(name) or _NAMES_SOMETHING_ELSE.search(name):
        return
    if _NAMES_A_FILE.search(name) or value.startswith(("/", "~/", "./")):
        yield from _in_file(value)
        if _NAMES_A_FILE.search(name) or os.path.exists(value):
            return
    yield value


def _is_telling(value: str) -> bool:
    """Whether a value is long and unusual enough to be a credential."""
    value = value.strip()
    return len(value) >= LONG or (
        len(value) >= SHORTEST and value.lower() not in _ORDINARY and len(set(value)) > 2
    )


def _in_file(path: str) -> tuple[str, ...]:
    path = os.path.expanduser(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=32)
def _read(path: str, written_ns: int, size_bytes: int) -> tuple[str, ...]:
    """The credentials in an ini, JSON or netrc file. For any other file, its whole text if it is one word."""
    text = ""
    if size_bytes <= MAX_FILE_BYTES and os.path.isfile(path):
        with suppress(OSError):
            text = Path(path).read_text("utf-8", "replace")
    found = [(match[1] or match[2]).strip() for match in _IN_A_FILE.finditer(text)]
    return tuple(found) if found or len(text.split()) != 1 else (text.strip(),)


# Redaction where text leaves the process

_asked_for: ContextVar[bool] = ContextVar("ffsplit_credential_asked_for", default=False)


class _Redacting:
    """A redacting text stream in front of another. Characters outside its encoding become \\uXXXX."""

    redacts = True  # also visible through a stream in front of this one

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        clean = text if _asked_for.get() else redacted(text)
        try:
            self.stream.write(clean)
        except UnicodeEncodeError as error:
            self.stream.write(_escaped(clean, encoding=error.encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _escaped(text: str, *, encoding: str) -> str:
    """Uses JSON's escapes, so that printed JSON stays valid."""

    def escape(character: str) -> str:
        try:
            character.encode(encoding)
            return character
        except UnicodeEncodeError:
            return json.dumps(character)[1:-1]

    return "".join(map(escape, text))


def guard_streams() -> None:
    """From now on, redact everything that this process prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not getattr(stream, "redacts", False):
            setattr(sys, name, _Redacting(stream))


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Redact everything that is printed in this context."""
    before = sys.stdout, sys.stderr
    guard_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def print_credential(text: str) -> None:
    """Print a credential that the user asked for, such as a share link."""
    token = _asked_for.set(True)
    try:
        print(text)
    finally:
        _asked_for.reset(token)


Item = TypeVar("Item")
Answer = TypeVar("Answer")


def guarded(function: Callable[[Item], Answer], item: Item) -> Answer:
    """Call a function with redacted output and errors, in a process whose output others read: a worker."""
    guard_streams()
    try:
        return function(item)
    except Exception as error:
        clean(error)
        raise


def clean(error: BaseException | None) -> None:
    """Remove credentials from an error and its causes, in place."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        each.args = tuple(redacted(value) if isinstance(value, str) else value for value in each.args)
        for name in ("strerror", "reason", "msg"):
            if isinstance(value := getattr(each, name, None), str):
                with suppress(AttributeError, TypeError):
                    setattr(each, name, redacted(value))
        waiting += [each.__cause__, each.__context__]
