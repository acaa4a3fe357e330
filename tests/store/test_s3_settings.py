"""Settings of S3 that cannot be meant: one line that names the variable, exit code 2, no value shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.cli import main
from ffsplit.store.s3_client import make_client

WRONG = [
    ("AWS_MAX_ATTEMPTS", "three", "a whole number, 1 or more"),
    ("AWS_MAX_ATTEMPTS", "0", "a whole number, 1 or more"),
    ("AWS_MAX_ATTEMPTS", "", "a whole number, 1 or more"),
    ("AWS_METADATA_SERVICE_TIMEOUT", "soon", "a whole number, 1 or more"),
    ("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1.5", "a whole number, 1 or more"),
    ("AWS_RETRY_MODE", "foolish", "standard or adaptive or legacy"),
    ("AWS_REGION", "us east 1", "a region such as"),
    ("AWS_DEFAULT_REGION", "us-east-1\n", "a region such as"),
    ("AWS_ENDPOINT_URL_S3", "not a link", "a URL such as"),
    ("AWS_ENDPOINT_URL_S3", "127.0.0.1:9000", "a URL such as"),
    ("AWS_ENDPOINT_URL_S3", "http://host:port", "a URL such as"),
    ("AWS_ENDPOINT_URL", "http://[::1", "a URL such as"),
    ("AWS_ENDPOINT_URL", "ftp://host", "a URL such as"),
    ("AWS_CA_BUNDLE", "/no/such/bundle", "a file of certificates that exists"),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "/no/such/token", "a file that exists"),
    ("AWS_DEFAULTS_MODE", "foolish", "legacy or standard"),
    ("AWS_STS_REGIONAL_ENDPOINTS", "foolish", "regional or legacy"),
    ("AWS_S3_US_EAST_1_REGIONAL_ENDPOINT", "foolish", "regional or legacy"),
    ("AWS_REQUEST_CHECKSUM_CALCULATION", "foolish", "when_required or when_supported"),
    ("AWS_RESPONSE_CHECKSUM_VALIDATION", "foolish", "when_required or when_supported"),
    ("AWS_ACCOUNT_ID_ENDPOINT_MODE", "foolish", "preferred or required"),
    ("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "foolish", "ipv4 or ipv6"),
    ("FFSPLIT_S3_CHECKSUM", "foolish", "when_required or when_supported"),
    ("FFSPLIT_S3_PATH_STYLE", "foolish", "1 or 0"),
]


def refusal(
    name: str,
    value: str,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The one line that a command ends with where the environment has this value."""
    monkeypatch.setenv(name, value)
    assert main(["list", uri]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_a_setting_that_cannot_be_meant_is_named(
    name: str,
    value: str,
    expected: str,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(name, value, s3_uri, monkeypatch, capsys)
    assert line.startswith(f"ffsplit: {name} must be {expected}") and "unset it" in line
    assert not value.strip("013.") or value.strip() not in line


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
@pytest.mark.parametrize(
    "value", ["some-key\n", "two words", "caf\u00e9", "\u2019quoted\u2019", "x" * 100_000]
)
def test_a_credential_that_no_request_may_have_is_named(
    name: str,
    value: str,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(name, value, s3_uri, monkeypatch, capsys)
    assert line.startswith(f"ffsplit: {name} is not a valid credential: ") and value.strip() not in line


def test_a_profile_is_named(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    credentials, broken = tmp_path / "credentials", tmp_path / "broken"
    credentials.write_text("[work]\naws_access_key_id = two words\naws_secret_access_key = some-secret\n")
    broken.write_text("these are [not\nsettings")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_PROFILE", "play")
    assert main(["list", s3_uri]) == 2
    assert capsys.readouterr().err == (
        "ffsplit: AWS_PROFILE names a profile that does not exist; known profiles: work\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert main(["list", s3_uri]) == 2
    printed = capsys.readouterr().err
    assert "aws_access_key_id of the profile work is not a valid credential" in printed
    assert "two words" not in printed
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.setenv(name, str(broken))
        assert main(["list", s3_uri]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ffsplit: {broken} is not valid") and name in line
        monkeypatch.setenv(name, "/dev/null")


def test_settings_that_are_meant_are_followed(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setenv("FFSPLIT_S3_PATH_STYLE", "true")
    client = make_client(s3_uri)
    assert client.meta.region_name == "eu-central-1"
    assert client.meta.config.retries == {"mode": "adaptive", "total_max_attempts": 3}  # type: ignore[attr-defined]
    assert client.meta.config.s3["addressing_style"] == "path"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("endpoint_url = not a link", "Invalid endpoint"),
        ("request_checksum_calculation = foolish", "got foolish"),
    ],
)
def test_what_a_config_file_sets_wrong_is_one_line(
    setting: str,
    said: str,
    s3_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config").write_text(f"[default]\n{setting}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert main(["list", s3_uri]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ffsplit: cannot open {s3_uri}: ") and said in line
    assert line.count("cannot open") == 1
