"""Signed artifacts: what is unsigned, tampered with or signed by another is not brought."""

import sys
from datetime import datetime
from pathlib import Path

import pytest

from ffsplit.cli import main
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.store import signing as module
from ffsplit.store.pull import pull, verify
from ffsplit.store.signing import sign_manifest, verify_manifest
from ffsplit.store.store import open_store
from tests.small_jobs import SmallJob

from .attempts import ATTEMPT, RUN_KEY, publish


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("model_signing", reason="pip install 'ffsplit[sign]'")
    return make_keys(tmp_path / "keys")


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A new private key and its public one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    folder.mkdir(parents=True)
    (folder / "private.pem").write_bytes(private)
    (folder / "public.pem").write_bytes(public)
    return folder / "private.pem", folder / "public.pem"


def test_a_signature_holds_for_these_bytes_and_this_key_alone(
    keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    signature = sign_manifest(b"{}", key=private)
    verify_manifest(b"{}", signature, key=public, label="x")
    _, other = make_keys(tmp_path / "other")
    for data, given, key in (
        (b"{ }", signature, public),
        (b"{}", signature, other),
        (b"{}", b"", public),
        (b"{}", signature[:-9], public),
        (b"{}", sign_manifest(b"{ }", key=private), public),
    ):
        with pytest.raises(ArtifactError, match="x: its signature does not match"):
            verify_manifest(data, given, key=key, label="x")


def test_keys_that_are_none(keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    for wrong in (tmp_path / "nowhere", tmp_path / "text", keys[1]):
        with pytest.raises(ConfigError) as caught:
            sign_manifest(b"{}", key=wrong)
        assert "\n" not in str(caught.value)
    for wrong in (tmp_path / "nowhere", tmp_path / "text"):
        with pytest.raises(ConfigError):
            verify_manifest(b"{}", b"", key=wrong, label="x")


def test_what_the_package_itself_refuses_is_one_line(
    keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the file is replaced after its kind was looked at."""
    monkeypatch.setattr(module, "check_key_kind", lambda key, private: None)
    (tmp_path / "text").write_text("no key")
    with pytest.raises(ConfigError, match=r"cannot sign with .*/text: .+: give a private key") as caught:
        sign_manifest(b"{}", key=tmp_path / "text")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot verify with .*/text: .+: give a public key") as caught:
        verify_manifest(b"{}", b"", key=tmp_path / "text", label="x")
    assert "\n" not in str(caught.value)


KINDS = {
    "an RSA private key": "rsa",
    "an Ed25519 private key": "ed25519",
    "an elliptic-curve private key of the curve secp256k1": "secp256k1",
    "an encrypted private key": "encrypted",
    "an elliptic-curve public key": "public",
    "an elliptic-curve private key": "private",
    "an RSA public key": "rsa public",
    "a certificate": "certificate",
    "a DER key": "der",
    "an OpenSSH key": "openssh",
    "not a key in PEM form, or a damaged one": "garbage",
    "not a key: it is not a file": "folder",
    "not a key: the file does not exist": "nowhere",
}


@pytest.fixture(scope="module")
def wrong_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of keys, and of what is none, by KINDS."""
    pytest.importorskip("model_signing", reason="pip install 'ffsplit[sign]'")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    folder = tmp_path_factory.mktemp("wrong-keys")
    pkcs8, plain = PrivateFormat.PKCS8, NoEncryption()
    curve, secret = ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"secret")
    large, subject = rsa.generate_private_key(65537, 2048), PublicFormat.SubjectPublicKeyInfo
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
    builder = builder.not_valid_before(datetime(2020, 1, 1)).not_valid_after(datetime(2050, 1, 1))
    certificate = builder.public_key(curve.public_key()).sign(curve, hashes.SHA256())
    files = {
        "rsa": large.private_bytes(Encoding.PEM, pkcs8, plain),
        "ed25519": ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, pkcs8, plain),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()).private_bytes(Encoding.PEM, pkcs8, plain),
        "encrypted": curve.private_bytes(Encoding.PEM, pkcs8, secret),
        "public": curve.public_key().public_bytes(Encoding.PEM, subject),
        "private": curve.private_bytes(Encoding.PEM, pkcs8, plain),
        "rsa public": large.public_key().public_bytes(Encoding.PEM, subject),
        "certificate": certificate.public_bytes(Encoding.PEM),
        "der": curve.private_bytes(Encoding.DER, pkcs8, plain),
        "openssh": curve.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, plain),
        "garbage": bytes(range(256)),
    }
    for file, data in files.items():
        (folder / file).write_bytes(data)
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_of_the_wrong_kind_is_called_what_it_is(
    kind: str, wrong_keys: Path, small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the file, what it is and what to give, exit code 2, nothing written or fetched."""
    key, out = wrong_keys / KINDS[kind], tmp_path / "out"
    for command, wanted in (
        (["compress", *small_job.arguments(out, "--runner", "serial", "--sign-key", str(key))], "private"),
        (["pull", "s3://nobody/nothing", str(out), "--verify-key", str(key)], "public"),
    ):
        if kind == f"an elliptic-curve {wanted} key":
            continue
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ffsplit: {key} is {kind}")
        assert kind.startswith("not a key: ") or f"give a {wanted} key of the curve P-256" in line
        assert not out.exists()


def test_a_key_that_may_not_be_read_is_said(keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"private.pem cannot be read: Permission denied"):
        sign_manifest(b"{}", key=keys[0])


def test_a_signed_run_is_pulled_and_an_unsigned_is_not(
    keys: tuple[Path, Path], small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    out = str(tmp_path / "out")
    arguments = ["compress", *small_job.arguments(out, "--runner", "serial", "--sign-key", str(private))]
    assert main(arguments) == 0 and verify(out).ok
    check = ["--verify-key", str(public)]
    assert main(["pull", out, str(tmp_path / "copy"), *check]) == 0
    assert main(["pull", str(tmp_path / "copy"), str(tmp_path / "copy of copy"), *check]) == 0
    manifest = next(Path(out).glob("*/*/manifest.json"))
    assert str(private) not in manifest.read_text()
    capsys.readouterr()
    (tmp_path / "copy" / "manifest.json.sig").unlink()
    assert main(["pull", str(tmp_path / "copy"), str(tmp_path / "third"), *check]) == 1
    assert "is not signed" in capsys.readouterr().err
    tampered = tmp_path / "copy of copy" / "manifest.json"
    tampered.write_text(tampered.read_text().replace('"seed": 0', '"seed": 1'))
    assert main(["pull", str(tampered.parent), str(tmp_path / "third"), *check]) == 1
    assert "its signature does not match" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_key_that_cannot_sign_is_said_before_the_work(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--runner", "serial", "--sign-key", str(tmp_path / "nowhere.pem")]
    assert main(["compress", *small_job.arguments(tmp_path / "out", *flags)]) == 2
    assert "nowhere.pem is not a key" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model_signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, name, None)
    store = open_store(str(tmp_path / "store"))
    publish(store, tmp_path / "attempt")
    store.put_bytes(f"{RUN_KEY}/{ATTEMPT}/manifest.json.sig", b"x")
    (tmp_path / "key").write_text("x")
    with pytest.raises(ConfigError, match=r"pip install 'ffsplit\[sign\]'"):
        pull(store.uri, tmp_path / "copy", verify_key=tmp_path / "key")
