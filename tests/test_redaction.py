"""Credentials never leave: not in a form that a library quotes them in, and nothing else is blanked out."""

from __future__ import annotations

import html
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffsplit.config import Record
from ffsplit.errors import ConfigError, FFSplitError
from ffsplit.exit_codes import exit_code_of
from ffsplit.redaction import _Redacting, clean, guarded, print_credential, redacted, without_credentials

SECRET = "q7Vt+kd/Lr9w=Zx2"


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if any(part in name for part in ("TOKEN", "SECRET", "ACCESS_KEY", "HF_", "CREDENTIALS")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name",
    [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "RAY_AUTH_TOKEN",
        "WANDB_API_KEY",
        "GITHUB_PAT",
        "DB_PASSWORD",
        "RAY_JOB_HEADERS",
        "some_new_secret",
    ],
)
def test_a_variable_with_a_name_like_one_is_a_credential(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"{SECRET}\n")
    assert redacted(f"cannot send '{SECRET}' there") == "cannot send '***' there"


@pytest.mark.parametrize("value", [f"/{SECRET}", f"./{SECRET}"])
def test_a_credential_may_begin_like_a_path(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", value)
    assert redacted(f"cannot sign with {value}") == "cannot sign with ***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAY_AUTH_TOKEN", "1"),
        ("HF_TOKEN", "true"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("TOKENIZERS_PARALLELISM", "false-or-so"),
        ("RAY_AUTH_MODE", "token-or-so"),
        ("AWS_SECRET_ACCESS_KEY", ""),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("API_KEY", "disabled"),
        ("PWD", "/some/folder"),
        ("SSH_AUTH_SOCK", "/some/socket"),
        ("AWS_PROFILE", "some-profile"),
        ("AWS_REGION", "eu-central-1"),
    ],
)
def test_what_is_none_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    text = f"1 of 1 is true, test 'test' {value!r} {value}"
    assert redacted(text) == text


VALUES = [
    SECRET,
    f"{SECRET}\n",
    f"{SECRET}\r\nX-Other: 1",
    f"two words {SECRET}",
    f"{SECRET}\u2019s",
    f"caf\u00e9-{SECRET}",
    f"\U0001f511{SECRET}",
    f'"{SECRET}"',
    f"<{SECRET}&>",
    SECRET * 5000,
]


@pytest.mark.parametrize("value", VALUES)
def test_every_form_that_libraries_quote_is_known(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", value)
    encoded = value.encode()
    for form in (
        value,
        repr(value),
        ascii(value),
        repr(encoded),
        str([value]),
        json.dumps({"a": value}),
        json.dumps({"a": value}, ensure_ascii=False),
        json.dumps({"a": repr(encoded)}),
        quote(value),
        quote(value, safe=""),
        quote_plus(value),
        html.escape(value),
        encoded.decode("latin-1"),
        repr(value)[:60],
        str(UnicodeEncodeError("latin-1", value, 0, 1, "ordinal not in range(256)")),
        f"https://host/{quote(value, safe='')}?x=1",
    ):
        assert SECRET[:9] not in redacted(f"before {form} after"), form[:80]
        if len(form) < 60:
            assert redacted(f"before {form} after").startswith("before ")
            assert redacted(f"before {form} after").endswith(" after")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("http://t0ken@host:80/x?y=1", "http://***@host:80/x?y=1"),
        ("?a=1&X-Amz-Signature=0f&b=2", "?a=1&X-Amz-Signature=***&b=2"),
        ("h/x?X-Amz-Credential=A%2Fb&amp;x=1", "h/x?X-Amz-Credential=***&amp;x=1"),
        ("h/x?token=ab", "h/x?token=***"),
        (r"Invalid header value b'ab\n': check", "Invalid header value ***: check"),
        ("Illegal header value b'Bearer a\\r'", "Illegal header value ***"),
        (r"character(s) in header value: 'ab\n' (x)", "character(s) in header value: *** (x)"),
        ("Authorization: Bearer ab.cd; next", "Authorization: ***; next"),
        ("{'authorization': 'Basic ab', 'b': 1}", "{'authorization': ***, 'b': 1}"),
        ("X-Amz-Security-Token=ab next", "X-Amz-Security-Token=*** next"),
        ("AWS4-HMAC-SHA256 Credential=A/b, Signature=c", "AWS4-HMAC-SHA256 Credential=***"),
        ("got AKIAIOSFODNN7EXAMPLE there", "got *** there"),
        ("hf_" + "a" * 34, "***"),
        ("-----BEGIN EC PRIVATE KEY-----\nMH\n-----END EC PRIVATE KEY-----", "***"),
        ("see s3://bucket/x@y and org/name@main", "see s3://bucket/x@y and org/name@main"),
        ("token classification, basic knowledge", "token classification, basic knowledge"),
    ],
)
def test_what_looks_like_a_credential_goes_too(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert json.loads(redacted(json.dumps({"a": text})))
    assert redacted(expected) == expected


@given(st.text())
def test_json_stays_json(text: str) -> None:
    shaped = f"https://{text}@h Invalid header value {text.encode()!r} ?sig={text} Authorization: {text!r}"
    once = redacted(json.dumps({"a": shaped, "b": 1}))
    assert json.loads(once)["b"] == 1 and redacted(once) == once


def test_files_that_hold_credentials_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        ".aws/credentials": "[default]\naws_access_key_id = AK0{s}\naws_secret_access_key = SK0{s}\n",
        ".cache/huggingface/token": "HT0{s}\n",
        ".ray/auth_token": "RT0{s}",
        ".netrc": "machine h login me password NP0{s}\n",
        "elsewhere": "EL0{s}\n",
        "key.json": '{{"type": "x", "private_key": "PK0{s}"}}\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.format(s=SECRET))
    monkeypatch.setenv("MY_TOKEN_FILE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    for kind in ("AK0", "SK0", "HT0", "RT0", "NP0", "EL0", "PK0"):
        assert redacted(f"at {kind}{SECRET} and") == "at *** and"
    assert redacted(f"in {tmp_path / 'elsewhere'}") == f"in {tmp_path / 'elsewhere'}"
    (tmp_path / "elsewhere").write_text(f"XY9{SECRET}1")
    assert redacted(f"at XY9{SECRET}1 and") == "at *** and"


def test_passwords_in_the_links_of_any_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{quote(SECRET, safe='')}@proxy:3128")
    assert redacted(f"proxy says {SECRET}") == "proxy says ***"
    assert redacted("http://proxy:3128") == "http://proxy:3128"


def test_an_error_of_ours_is_made_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert str(ConfigError(f"not had with {SECRET}")) == "not had with ***"
    assert str(FFSplitError()) == ""


class Leaky:
    def __call__(self, item: str) -> None:
        print(f"on stdout: {item}")
        print(f"on stderr: {item}", file=sys.stderr)
        try:
            raise OSError(5, f"device of {item}")
        except OSError as error:
            raise ValueError(f"bad {item}", 3) from error


def test_what_a_worker_prints_and_raises_is_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    with pytest.raises(ValueError, match=r"bad \*\*\*") as caught:
        guarded(Leaky(), SECRET)
    assert str(caught.value.__cause__) == "[Errno 5] device of ***"
    captured = capsys.readouterr()
    assert captured.out == "on stdout: ***\n" and captured.err == "on stderr: ***\n"
    clean(None)


def test_a_command_prints_without_whatever_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    before = sys.stdout, sys.stderr

    def run() -> int:
        print(f"result {SECRET}")
        print_credential(f"link {SECRET}")
        raise ConfigError(f"mistake {SECRET}")

    assert exit_code_of(run) == 2
    captured = capsys.readouterr()
    assert captured.out == f"result ***\nlink {SECRET}\n" and captured.err == "ffsplit: mistake ***\n"
    assert (sys.stdout, sys.stderr) == before


TRACEBACK = """
from ffsplit.exit_codes import exit_code_of
import threading, os, warnings, logging
def leak():
    raise RuntimeError("in a thread: " + os.environ["HF_TOKEN"])
def run():
    thread = threading.Thread(target=leak); thread.start(); thread.join()
    warnings.warn("warned of " + os.environ["HF_TOKEN"])
    logging.error("logged %s", os.environ["HF_TOKEN"])
    try:
        raise KeyError(os.environ["HF_TOKEN"])
    except KeyError as error:
        raise RuntimeError("at the end: " + repr(os.environ["HF_TOKEN"])) from error
raise SystemExit(exit_code_of(run))
"""


@pytest.mark.subprocess
def test_tracebacks_warnings_and_threads_are_covered() -> None:
    environment = os.environ | {"HF_TOKEN": f"{SECRET}\n", "FFSPLIT_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", TRACEBACK], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    for word in ("in a thread: ***", "warned of ***", "logged ***", "at the end: '***", "Traceback"):
        assert word in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_what_an_encoding_lacks_is_escaped_as_in_json() -> None:
    raw = io.BytesIO()
    stream = _Redacting(io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    print(json.dumps({"name": "caf\u00e9 \U0001f511"}, ensure_ascii=False), file=stream, flush=True)
    assert json.loads(raw.getvalue()) == {"name": "caf\u00e9 \U0001f511"}
    assert stream.encoding == "ascii" and not stream.isatty()


def test_many_lines_at_once_are_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `traceback` and others write them."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    text = io.StringIO()
    _Redacting(text).writelines(["a line\n", f"with {SECRET}\n"])
    assert text.getvalue() == "a line\nwith ***\n"


def test_a_record_is_stored_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Example(Record):
        place: str
        number: int

    clean_record = Example(place="s3://bucket/x", number=1)
    assert without_credentials(clean_record) is clean_record
    found = without_credentials(Example(place="https://me:pw@host/x", number=1))
    assert found == Example(place="https://***@host/x", number=1)
