"""Signatures of manifests, and by their digests of every file, in the format of OpenSSF Model Signing.

`manifest.json.sig` lies beside the manifest and is no part of what the manifest lists. Its tools check
it too: `model_signing verify key DIR --signature DIR/manifest.json.sig --public_key KEY
--ignore_unsigned_files`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit.artifacts.manifest import MANIFEST_NAME
from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.temporary import temporary_folder

if TYPE_CHECKING:
    from types import ModuleType

MAX_SIGNATURE_BYTES = 1 << 20


def sign_manifest(data: bytes, *, key: Path) -> bytes:
    """The signature of a manifest's bytes with an elliptic-curve private key in PEM form.

    Raises ConfigError when the key cannot be used or model-signing is not installed.
    """
    signing = _package("signing", key)
    with temporary_folder() as folder:
        model, signature = _lay_out(folder, data)
        try:
            signing.Config().use_elliptic_key_signer(private_key=key).sign(model, signature)
        except Exception as error:  # the package and its cryptography raise many kinds
            raise ConfigError(
                f"cannot sign with {key}: {_reason(error)}: give an EC private key in PEM form, not encrypted"
            ) from error
        return signature.read_bytes()


def verify_manifest(data: bytes, signature: bytes, *, key: Path, label: str) -> None:
    """Raise ArtifactError unless the signature of these bytes is of the private key to this public one.

    Raises ConfigError when the key cannot be read or model-signing is not installed.
    """
    verifying = _package("verifying", key)
    with temporary_folder() as folder:
        model, path = _lay_out(folder, data)
        path.write_bytes(signature)
        try:
            checker = verifying.Config().use_elliptic_key_verifier(public_key=key)
        except Exception as error:
            why = f"cannot verify with {key}: {_reason(error)}"
            raise ConfigError(f"{why}: give an EC public key in PEM form") from error
        try:
            checker.verify(model, path)
        except Exception as error:
            raise ArtifactError(f"{label}: its signature is not of {key}: do not use it") from error


def _lay_out(folder: Path, data: bytes) -> tuple[Path, Path]:
    """A directory with the manifest alone, and where its signature goes."""
    model = folder / "artifact"
    model.mkdir()
    (model / MANIFEST_NAME).write_bytes(data)
    return model, folder / "signature"


def _package(name: str, key: Path) -> ModuleType:
    """A module of model-signing. Raises ConfigError when it, or the key's file, is not there."""
    if not key.is_file():
        raise ConfigError(f"{key} is no key: the file does not exist")
    try:
        from importlib import import_module

        return import_module(f"model_signing.{name}")
    except ImportError:
        raise ConfigError("signatures need model-signing: pip install 'ffsplit[sign]'") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
