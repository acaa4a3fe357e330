"""No file of cluster/ has a secret in it, and none asks for one where others could read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, kubernetes_objects

FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
SECRETS = {
    "an AWS key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a token in place": re.compile(r"RAY_AUTH_TOKEN\s*[=:]\s*[^\s$(<{]"),
    "a secret key in place": re.compile(r"(?i)(secret_access_key|password|passwd)\s*[=:]\s*[^\s.$(<{]"),
    "a hub token": re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_no_file_has_a_secret(path: Path) -> None:
    text = path.read_text("utf-8")
    for name, pattern in SECRETS.items():
        assert not pattern.search(text), f"{path} has {name}"


@pytest.mark.parametrize(
    "text",
    [
        "RAY_AUTH_TOKEN=0123456789",
        "AWS_SECRET_ACCESS_KEY: abcdef",
        "AKIA" + "A" * 16,
        "-----BEGIN EC PRIVATE KEY-----",
    ],
)
def test_a_secret_would_be_found(text: str) -> None:
    assert any(pattern.search(text) for pattern in SECRETS.values())


def test_nothing_secret_travels_with_a_job() -> None:
    """What is in a runtime_env is shown to whoever may list jobs; no file has one."""
    for found in kubernetes_objects():
        assert "runtimeEnvYAML" not in str(found)
        assert found["kind"] != "Secret"
    for path in FILES:
        if path.suffix in (".yaml", ".service"):
            assert "--runtime-env" not in path.read_text("utf-8")


def test_credentials_come_from_the_nodes_identity() -> None:
    for path in FILES:
        if path.suffix in (".yaml", ".json"):
            assert not re.search(r"AWS_(ACCESS|SECRET|SESSION)", path.read_text("utf-8"))
