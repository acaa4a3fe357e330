"""Upload an artifact to the Hugging Face hub: all of it or nothing, in one commit.

No digest of a file that is uploaded may differ from the manifest's. The hub's client hashes large files
while it sends them, before the commit that makes them visible; small files are in the commit itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ffsplit.errors import ArtifactError, ConfigError, FFSplitError, StoreError, begun, reason_of
from ffsplit.store.artifact import Location, locate, parse_manifest, read_manifest_bytes
from ffsplit.store.entries import MANIFEST_NAME, SIGNATURE_NAME
from ffsplit.store.manifest import Manifest
from ffsplit.store.pull import materialize

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MAX_INLINE_BYTES = 10 << 20
"""The hub takes only smaller files into a commit itself. They are read once: hashed, then sent."""
_REPO = re.compile(r"(?=.{3,96}\Z)(?!.*(--|\.\.|\.git\Z))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII | re.DOTALL)
HUB_OWN = frozenset({".gitattributes"})
"""What the hub puts into a new repository."""
LOG_IN = "set HF_TOKEN, or run `hf auth login`"


def push(uri: str | os.PathLike[str], repo: str, *, public: bool = False) -> str:
    """Upload a committed artifact to a new repository of the hub, `org/name`, and return its address.

    The repository is private unless `public`. One that exists is used only if it is empty, as an
    interrupted push leaves it. HF_ENDPOINT and HF_TOKEN mean what they mean to huggingface_hub. Raises
    ConfigError, before anything is written, for what the user can fix: a name that is taken or invalid, a
    token that is missing or refused, an artifact that is not committed. Raises ArtifactError if a file does
    not match the manifest, and StoreError if the hub fails; then nothing is visible there.
    """
    api = _connected(repo)
    location = locate(os.fspath(uri))
    if location.run_key is not None and location.commit is None:
        raise ConfigError(f"{location.uri} is not committed: only a committed run can be pushed")
    data = read_manifest_bytes(location)
    manifest = parse_manifest(location, data)
    if manifest.kind != "model":
        raise ConfigError(f"{location.uri} holds statistics, not a model: give the URI of a model")
    additions = _additions(materialize(location.uri), manifest, data)
    parent = _claim(api, repo, public=public)
    with begun(), _asking(api, f"{repo} was not uploaded"), _bars_on_terminals_alone():
        _upload(api, repo, additions, manifest, location=location, parent=parent)
    return f"{api.endpoint}/{repo}"


def _connected(repo: str) -> HfApi:
    """The hub's client. Raises ConfigError, before any request, for a name or token that cannot be right."""
    from huggingface_hub import HfApi, constants, get_token

    if not _REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no name of a repository: write org/name, as on the hub")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it")
    token = get_token()
    if token is None:
        raise ConfigError(f"the hub needs a token with write access: {LOG_IN}")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"the hub token contains characters that no token has: {LOG_IN}")
    return HfApi(token=token)


def _additions(directory: Path, manifest: Manifest, data: bytes) -> dict[str, CommitOperationAdd]:
    """The files to upload, by path. Small ones are read and checked at once. Raises ArtifactError."""
    from huggingface_hub import CommitOperationAdd

    found = {MANIFEST_NAME: CommitOperationAdd(MANIFEST_NAME, data)}
    if (directory / SIGNATURE_NAME).is_file():
        found[SIGNATURE_NAME] = CommitOperationAdd(SIGNATURE_NAME, (directory / SIGNATURE_NAME).read_bytes())
    for entry in manifest.files:
        path = directory / entry.path
        try:
            small = path.read_bytes() if entry.size_bytes <= MAX_INLINE_BYTES else None
            found[entry.path] = CommitOperationAdd(entry.path, path if small is None else small)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{directory}: cannot read {entry.path}: {reason_of(error)}") from error
        if small is not None and hashlib.sha256(small).hexdigest() != entry.sha256:
            raise _differs(directory, entry.path)
    return found


def _claim(api: HfApi, repo: str, *, public: bool) -> str | None:
    """Create the repository, or take one that is empty. Returns its newest commit."""
    from huggingface_hub.errors import HfHubHTTPError

    with _asking(api, f"{repo} was not created"):
        try:
            api.create_repo(repo, private=not public)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
        try:
            info = api.model_info(repo)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
            raise _taken(repo) from None  # somebody else's, which this token may not see
    if {each.rfilename for each in info.siblings or ()} - HUB_OWN:
        raise _taken(repo)
    if info.private == public:
        stands, wanted = ("private", "public") if public else ("public", "private")
        raise ConfigError(
            f"{repo} exists and is {stands}: make it {wanted} on the hub, or choose another name"
        )
    return info.sha


def _taken(repo: str) -> ConfigError:
    return ConfigError(f"{repo} is taken on the hub: choose another name, or delete that repository")


def _upload(
    api: HfApi,
    repo: str,
    additions: dict[str, CommitOperationAdd],
    manifest: Manifest,
    *,
    location: Location,
    parent: str | None,
) -> None:
    """Send every large file, check what was sent, then commit. Raises ArtifactError for a mismatch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that models have no Parquet files
        api.preupload_lfs_files(repo, additions.values(), free_memory=False)
        for entry in manifest.files:
            if additions[entry.path].upload_info.sha256.hex() != entry.sha256:
                raise _differs(location.uri, entry.path)
        api.create_commit(
            repo,
            operations=list(additions.values()),
            commit_message=f"{manifest.model.id}, compressed with FFSplit {manifest.ffsplit_version}",
            commit_description=f"Run {manifest.run_key}, attempt {manifest.attempt}",
            parent_commit=parent,
        )


def _differs(place: Path | str, path: str) -> ArtifactError:
    return ArtifactError(
        f"{place}: {path} does not match its manifest's sha256: nothing was uploaded; publish it again"
    )


@contextmanager
def _asking(api: HfApi, what: str) -> Iterator[None]:
    """Turn the errors of the hub and its client into one line, without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except FFSplitError:
        raise
    except HfHubHTTPError as error:
        status, told = error.response.status_code, error.server_message or reason_of(error)
        if status == 401:
            raise ConfigError(f"{what}: {api.endpoint} refused the token: {LOG_IN}") from error
        if status == 403:
            raise ConfigError(f"{what}: the token may not write there ({told}): {LOG_IN}") from error
        if status == 412:
            raise StoreError(f"{what}: the repository was changed meanwhile; choose another name") from error
        kind = ConfigError if 400 <= status < 500 and status not in (408, 429) else StoreError
        raise kind(f"{what}: {api.endpoint} answered {status}: {told}") from error
    except Exception as error:  # the client raises its own types and those of its HTTP library
        told = " ".join(str(error).split()) if isinstance(error, ValueError) else reason_of(error)
        raise StoreError(f"{what}: {api.endpoint}: {told}") from error


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    """Hide the client's progress bars where stderr is a file or a pipe."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled() or (sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
