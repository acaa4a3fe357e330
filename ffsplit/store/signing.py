"""Signatures of manifests in the format of OpenSSF Model Signing. The manifest's digests cover every file.

`manifest.json.sig` lies beside the manifest, which does not list it. OpenSSF's tools verify it too:
`model_signing verify key DIR --signature DIR/manifest.json.sig --public_key KEY --ignore_unsigned_files`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffsplit.directories import temporary_folder
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.store.entries import MANIFEST_NAME

if TYPE_CHECKING:
    from types import ModuleType


MAX_SIGNATURE_BYTES = 1 << 20
CURVES = ("secp256r1", "secp384r1", "secp521r1")
_WANTED = {
    True: "give a private key of the curve P-256, P-384 or P-521 in PEM form, not encrypted",
    False: "give a public key of the curve P-256, P-384 or P-521 in PEM form",
}


def sign_manifest(data: bytes, *, key: Path) -> bytes:
    """The signature of a manifest's bytes by an elliptic-curve private key in PEM form.

    Raises ConfigError if the key cannot be used or model-signing is not installed.
    """
    signing = _package("signing")
    check_key_kind(key, private=True)
    with temporary_folder() as folder:
        model, signature = _lay_out(folder, data)
        try:
            signing.Config().use_elliptic_key_signer(private_key=key).sign(model, signature)
        except Exception as error:  # the package and its cryptography raise many kinds
            raise ConfigError(f"cannot sign with {key}: {_reason(error)}: {_WANTED[True]}") from error
        return signature.read_bytes()


def verify_manifest(data: bytes, signature: bytes, *, key: Path, label: str) -> None:
    """Raise ArtifactError unless these bytes were signed with the private key of this public key.

    Raises ConfigError if the key cannot be read or model-signing is not installed.
    """
    verifying = _package("verifying")
    check_key_kind(key, private=False)
    with temporary_folder() as folder:
        model, path = _lay_out(folder, data)
        path.write_bytes(signature)
        try:
            checker = verifying.Config().use_elliptic_key_verifier(public_key=key)
        except Exception as error:
            raise ConfigError(f"cannot verify with {key}: {_reason(error)}: {_WANTED[False]}") from error
        try:
            checker.verify(model, path)
        except Exception as error:
            raise ArtifactError(f"{label}: its signature does not match {key}: do not use it") from error


def check_key_kind(key: Path, *, private: bool) -> None:
    """Raise ConfigError, naming what the file holds, unless it holds a key of the wanted kind."""
    _package("signing" if private else "verifying")
    found = _kind_of(_read(key))
    if found != _kind(private):
        raise ConfigError(f"{key} is {found}: {_WANTED[private]}")


def _kind(private: bool) -> str:
    return f"an elliptic-curve {'private' if private else 'public'} key"


def _read(key: Path) -> bytes:
    if key.exists() and not key.is_file():
        raise ConfigError(f"{key} is not a key: it is not a file")
    try:
        with key.open("rb") as file:
            return file.read(MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{key} is not a key: the file does not exist") from None
    except OSError as error:
        raise ConfigError(f"{key} cannot be read: {error.strerror or error}") from None


def _kind_of(data: bytes) -> str:
    """What a file holds, in words."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509 import load_pem_x509_certificate

    loads: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("private key", lambda: serialization.load_pem_private_key(data, password=None)),
        ("public key", lambda: serialization.load_pem_public_key(data)),
        ("certificate", lambda: load_pem_x509_certificate(data)),
        ("OpenSSH key", lambda: serialization.load_ssh_private_key(data, password=None)),
        ("OpenSSH key", lambda: serialization.load_ssh_public_key(data)),
        ("DER key", lambda: serialization.load_der_private_key(data, password=None)),
        ("DER key", lambda: serialization.load_der_public_key(data)),
    )
    for name, load in loads:
        try:
            loaded = load()
        except TypeError:  # a password is needed
            return f"an encrypted {name}"
        except Exception:  # cryptography raises many kinds
            continue
        return _named(name, loaded)
    return "not a key in PEM form, or a damaged one"


def _named(name: str, loaded: object) -> str:
    if name not in ("private key", "public key"):
        return f"a{'n' if name[0] in 'O' else ''} {name}"
    if (curve := getattr(loaded, "curve", None)) is not None:
        return f"an elliptic-curve {name}" + ("" if curve.name in CURVES else f" of the curve {curve.name}")
    kind = type(loaded).__name__.removeprefix("_").removesuffix("Key").removesuffix("Private")
    return f"an {kind.removesuffix('Public')} {name}"


def _lay_out(folder: Path, data: bytes) -> tuple[Path, Path]:
    """A directory with the manifest alone, and where its signature goes."""
    model = folder / "artifact"
    model.mkdir()
    (model / MANIFEST_NAME).write_bytes(data)
    return model, folder / "signature"


def _package(name: str) -> ModuleType:
    """A module of model-signing. Raises ConfigError if it is not installed."""
    try:
        from importlib import import_module

        return import_module(f"model_signing.{name}")
    except ImportError:
        raise ConfigError("signatures need model-signing: pip install 'ffsplit[sign]'") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
