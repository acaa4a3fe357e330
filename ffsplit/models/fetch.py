"""Finds the directory on disk for the model that a user names: a directory, an artifact or a hub id."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from contextlib import suppress
from glob import escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ffsplit.config import Record
from ffsplit.directories import user_path
from ffsplit.errors import ArtifactError, ConfigError, StoreError, reason_of
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.family import Media
from ffsplit.models.folder import CONFIG_NAME, MOST_NAMES, FolderFiles, Listing, local_listing, sort_files
from ffsplit.models.not_a_model import check_is_model, check_modules
from ffsplit.models.source_card import titled
from ffsplit.store.artifact import locate, names_alias
from ffsplit.store.cache import StoredFiles, is_remote, stored_files
from ffsplit.store.entries import MANIFEST_NAME, RUN_KEY, FileEntry, LeftOut, sha256_file
from ffsplit.store.manifest import Manifest
from ffsplit.store.scratch import Scratch
from ffsplit.store.store import open_store, root_uri

# A checkpoint's directory, as each host finds it.


class ModelSource(Record):
    """Where a checkpoint is: a path on one host, or for several hosts a shared path or files in a store.

    With several hosts, `files` are what each must find at the path. With `stored`, the path is ignored:
    every host fetches the files into its own cache. `left_out` are the names of FFNs that a run leaves as
    they are; None: the usual ones. `reads` is what its calibration data holds.
    """

    path: str
    files: tuple[FileEntry, ...] = ()
    stored: StoredFiles | None = None
    left_out: tuple[str, ...] | None = None
    reads: Media = ()

    def checkpoint(self, *, uneven: bool = False) -> Checkpoint:
        """The checkpoint on this host. Raises as `directory` and `open_checkpoint` do."""
        return open_checkpoint(self.directory(), uneven=uneven, left_out=self.left_out, reads=self.reads)

    def directory(self) -> Path:
        """The directory on this host. Raises ConfigError when this host does not see it."""
        if self.stored is not None:
            return self.stored.materialize()
        directory = Path(self.path)
        if all(_size(directory / entry.path) == entry.size_bytes for entry in self.files):
            return directory
        raise ConfigError(
            f"{directory}: host {socket.gethostname()} has joined and does not see these files: "
            "give a directory that all hosts share, or s3://bucket/prefix"
        )

    def is_here(self) -> bool:
        """Whether this host has the same files at the path, by digest."""
        directory = Path(self.path)
        return all(
            _size(directory / entry.path) == entry.size_bytes
            and sha256_file(directory / entry.path) == entry.sha256
            for entry in self.files
        )


def described(source: ModelSource) -> ModelSource:
    """A local checkpoint with the digests of its files, its own code included. Reads every file."""
    directory = Path(source.path)
    entries = tuple(
        FileEntry(path=name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
        for name in sort_files(local_listing(directory)).wanted
        for path in [directory / name]
    )
    return source.model_copy(update={"files": entries})


def staged(source: ModelSource, scratch: Scratch, *, once: bool) -> ModelSource:
    """Copy a checkpoint into the scratch, for all hosts. `once`: files already there have this content."""
    store, prefix = open_store(scratch.uri), scratch.prefix
    there = {entry.key: entry.size_bytes for entry in store.list_details(prefix)} if once else {}
    for entry in source.files:
        if there.get(f"{prefix}/{entry.path}") != entry.size_bytes:
            store.put_file(f"{prefix}/{entry.path}", Path(source.path, entry.path).resolve())
    stored = StoredFiles(uri=f"{store.uri}/{prefix}", files=source.files)
    return source.model_copy(update={"files": (), "stored": stored})


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


HUB_ID = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")
ALMOST_HUB_ID = re.compile(
    r"(?:hf:(?://)?|https?://(?:www\.)?huggingface\.co/|huggingface\.co/)?"
    r"(?P<id>[\w.\-]+(?:/[\w.\-]+)?)(?:@(?P<at>[\w./\-]+)|/(?:tree|resolve|blob)/(?P<tree>[\w.\-]+).*)?/?"
)
"""A hub id with a revision after it or a scheme before it."""
HUB_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/[0-9a-f]{40}$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
GENERIC_NAMES = ("model", "checkpoint", "final", "best")


class LocatedModel(NamedTuple):
    """A model's directory, the hub revision it was resolved to, and for a model in a store, its files there.

    The directory is on this machine; other nodes materialize `stored`. `left_out` are files that were not
    fetched because no artifact would keep them.
    """

    directory: Path
    revision: str | None
    stored: StoredFiles | None = None
    left_out: tuple[LeftOut, ...] = ()


def locate_model(model: str, *, revision: str | None = None) -> LocatedModel:
    """Find a local directory, or fetch a model from s3:// or the hub into a cache.

    A location where runs were published stands for the artifact that `ffsplit verify` finds there. Raises
    ConfigError when there is no such directory and the hub does not have the model either.
    """
    if not model.strip():
        raise ConfigError("MODEL is empty: give a directory, s3://bucket/prefix or a hub id")
    if is_remote(model):
        if revision is not None:
            raise ConfigError(f"--revision is for hub ids; {model} is in a store")
        return _fetch(model)
    directory = user_path(root_uri(model) if model.lower().startswith("file:") else model)
    if directory.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision is for hub ids; {model} is a local directory")
        if (directory / CONFIG_NAME).is_file():
            return LocatedModel(directory.resolve(), None)
        artifact = _artifact_in(str(directory))
        return LocatedModel(Path(artifact or directory).resolve(), None)
    if (named := names_alias(model)) and Path(named[0].uri).is_dir():
        return LocatedModel(Path(locate(model).uri).resolve(), None)
    if directory.exists():
        raise ConfigError(f"model {model} is a file; give the directory that holds config.json")
    if not HUB_ID.match(model) or model.startswith("."):
        raise ConfigError(_no_such_directory(model))
    return _download(model, revision)


def _artifact_in(uri: str) -> str | None:
    """The artifact published at a location without config.json; None if no run was published there.

    Raises ConfigError when there are runs but no artifact.
    """
    try:
        return locate(uri).uri
    except ConfigError:
        if any(RUN_KEY.fullmatch(name) for name in open_store(uri).list_directories("")):
            raise
    return None


def _no_such_directory(model: str) -> str:
    match = ALMOST_HUB_ID.fullmatch(model)
    if match is None or match["id"] == model.rstrip("/") or model.startswith("."):
        return f"model directory {model} does not exist"
    revision = match["at"] or match["tree"]
    flag = f" with --revision {revision}" if revision else ""
    return f"model {model} is neither a directory nor a hub id: give {match['id']}{flag}"


def _fetch(model: str) -> LocatedModel:
    """A model in a store, or the artifact published at a location in a store."""
    if names_alias(model):
        model = locate(model).uri
    elif not open_store(model).exists(CONFIG_NAME):
        model = _artifact_in(model) or model
    store, left_out = open_store(model), list[LeftOut]()
    if not store.exists(CONFIG_NAME):
        names = tuple(islice(store.list(""), MOST_NAMES))
        if not names:
            raise ConfigError(f"model directory {model} does not exist, or holds no model")
        check_is_model(Listing(model, names, store.get_bytes))

    def choose(names: tuple[str, ...]) -> Collection[str]:
        files = _checked(Listing(model, names, store.get_bytes))
        left_out.extend(files.left_out)
        return files.wanted

    stored = stored_files(model, choose=choose)
    return LocatedModel(stored.materialize(), None, stored, tuple(left_out))


def _checked(listing: Listing) -> FolderFiles:
    """Sort the files of a remote folder. Raises ConfigError, before fetching any, if it is not a model."""
    check_is_model(listing)
    files = sort_files(listing)
    check_modules(listing, files)
    return files


def _download(model: str, revision: str | None) -> LocatedModel:
    """Download a hub id's snapshot, without files that no artifact keeps. Offline, use the cached one."""
    from huggingface_hub import hf_hub_download, snapshot_download

    def read(name: str) -> bytes:
        return Path(hf_hub_download(model, name, revision=revision)).read_bytes()

    try:
        names = _hub_names(model, revision)
        if names is None:
            path = snapshot_download(model, revision=revision, allow_patterns=[CONFIG_NAME])
            return LocatedModel(Path(path), Path(path).name)
        files = _checked(Listing(model, names, read))
        unwanted = sorted(set(names) - set(files.wanted))
        path = snapshot_download(model, revision=revision, ignore_patterns=[*map(escape, unwanted)])
        return LocatedModel(Path(path), Path(path).name, left_out=files.left_out)
    except ConfigError:
        raise
    except Exception as error:  # the hub client raises many types, requests' and its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model {model}: no such directory, and not fetched from the hub ({reason})"
        ) from None


def hub_commit(model: str, *, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub model names now; None for other models, and offline.

    Raises StoreError if the hub does not answer or does not know it.
    """
    is_id = HUB_ID.match(model) and not model.startswith(".") and not is_remote(model)
    if not is_id or user_path(model).exists():
        return None
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().model_info(model, revision=revision).sha
    except Exception as error:  # the hub client raises many types, requests' and its own
        raise StoreError(f"model {model}: the hub gave no commit ({reason_of(error)})") from error


def _hub_names(model: str, revision: str | None) -> tuple[str, ...] | None:
    """The files of a hub repository, as the hub or an earlier download lists them; None if neither does."""
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().model_info(model, revision=revision).siblings or []
        return tuple(each.rfilename for each in found)
    except Exception:  # offline, or an id that the hub does not know: try the cache
        cached = getattr(huggingface_hub, "get_cached_repo_tree", None)  # since 2.0
        try:
            return None if cached is None else tuple(each.path for each in cached(model, revision=revision))
        except Exception:
            return None


def model_name(model: str) -> str:
    """The name of a model in reports: its hub id, or the name of its local directory.

    In the place of a generic name stands the title of the model's card, or the name with its parent's before
    it. A snapshot in the hub's cache has its hub id, and an artifact its original's name.
    """
    path = user_path(model).resolve()
    if not path.is_dir():
        return model
    with suppress(OSError, ArtifactError):
        return Manifest.from_json((path / MANIFEST_NAME).read_bytes()).model.id
    if (cached := HUB_SNAPSHOT.search(path.as_posix())) is not None:
        return cached["id"].replace("--", "/")
    if path.name not in GENERIC_NAMES:
        return path.name
    return titled(path) or f"{path.parent.name}/{path.name}"
