"""Sorts the files of a model's folder: the transformer's weights, companions, and files left out.

Everything in a folder and its sub-folders belongs to the model, with known exceptions: other copies of the
transformer's weights, pickles, adapters, and hidden files (caches, version control, settings). One answer
decides what an artifact keeps, what is fetched from a store or the hub, what other hosts receive, and what
is digested for the run key. It needs only file names, so nothing is downloaded for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ffsplit.errors import ArtifactError, ConfigError
from ffsplit.models.source_card import CARD_NAME, ORIGINAL_CARD, read_card
from ffsplit.models.tensor_files import INDEX_NAME
from ffsplit.store.artifact import STATISTICS_PATH
from ffsplit.store.entries import MANIFEST_NAME, SIGNATURE_NAME, LeftOut, colliding, is_safe_path
from ffsplit.store.manifest import REPORT_NAME

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"

COPY = "another copy of the original's weights"
PICKLE = "a pickle, which can run code when it is loaded"
ADAPTER = "an adapter, made for the original's weights"
HIDDEN = "caches, version control and hidden files"
WEIGHTLESS = "it describes a file that is left out"
OWN = "the artifact has its own"
NO_FILE = "not a regular file, or its name is not valid in every store"

CACHES = frozenset({"__pycache__", "__MACOSX", "Thumbs.db", "desktop.ini"})
COPY_FOLDERS = re.compile(r"(checkpoint|global_step|epoch)[-_]?\d+|.*\.(mlpackage|mlmodelc)")
"""Folders that hold a whole copy of the model, from an earlier step or in another format."""
OTHER_FORMATS = re.compile(
    r".*\.(h5|msgpack|ot|gguf|ggml|onnx|onnx[._]data|tflite|pb|mlmodel|nemo|mar|keras|pte|ptl|engine|mnn)"
    r"|.*\.ckpt\.(index|meta|data-.*)|openvino_.*\.(xml|bin)",
    re.IGNORECASE,
)
WEIGHT_NAMES = re.compile(r"((pytorch_|tf_|flax_)?model|consolidated)([.-].*)?\.[a-z]+", re.IGNORECASE)
"""Names that formats give a transformer's weights. Those that the model is not read from are copies."""
INDEXES = re.compile(r".*\.(safetensors|bin|h5|msgpack)\.index(\..*)?\.json", re.IGNORECASE)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
ADAPTERS = re.compile(r"adapter_config\.json|(adapter_model|pytorch_adapter)\..*")
NEEDS_LEFT_OUT = frozenset({"config_setfit.json", "ort_config.json", "openvino_config.json"})
"""Configs of files that are always left out: SetFit's pickled head, ONNX and OpenVINO exports."""
ARTIFACT_NAMES = frozenset(
    {MANIFEST_NAME, SIGNATURE_NAME, REPORT_NAME, STATISTICS_PATH, STATISTICS_PATH.partition("/")[0]}
)
DOCUMENTS = re.compile(
    r"(.*/)?((README|LICEN[CS]ES?|NOTICE|COPYING|USE_POLICY|CITATION)([-_][\w-]*)?(\.(txt|rst|cff))?"
    r"|[^/]*\.(md|png|jpe?g|gif|svg|webp|pdf|html|mp4))",
    re.IGNORECASE,
)
"""Documents for people. They are kept, but change no result."""
MOST_NAMES = 10_000
"""Upper limit on names listed in a folder without config.json, which may be any folder at all."""
MOST_SHOWN = 6
POINTER = b"version https://git-lfs"


class Listing(NamedTuple):
    """The files of a folder on a disk, in a store or on the hub.

    A name that ends with / is a folder whose contents were not listed. `others` are not regular files.
    """

    where: str
    names: tuple[str, ...]
    read: Callable[[str], bytes]
    others: tuple[str, ...] = ()

    def read_json(self, name: str) -> object:
        """A file's JSON value; None if the file is missing or not JSON."""
        try:
            return json.loads(self.read(name)) if name in self.names else None
        except (ValueError, RecursionError):
            return None


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder, sorted. `anew` are config and weights, which an artifact has in another form."""

    anew: tuple[str, ...]
    companions: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The files that a host needs to work on the model."""
        return tuple(sorted((*self.anew, *self.companions)))

    @property
    def digested(self) -> tuple[str, ...]:
        """The companions that a result may depend on, such as tokenizers: all but documents."""
        return tuple(name for name in self.companions if not DOCUMENTS.fullmatch(name))


def sort_files(
    listing: Listing,
    *,
    weights: Collection[str] | None = None,
    is_copy: Callable[[str], bool] = lambda name: False,
) -> FolderFiles:
    """Sort the files of a model's folder.

    `weights` are the files that the model is read from, if already known. `is_copy` inspects other
    safetensors files, if they are local.
    """
    read = {CONFIG_NAME, INDEX_NAME, *(stated_weights(listing) if weights is None else weights)}
    anew = tuple(name for name in listing.names if name in read)
    reasons = {name: (_escaped(name), NO_FILE) for name in listing.others}
    for name in listing.names:
        if name not in read and (found := _why_left_out(name, listing.names, is_copy)):
            reasons[name] = found
    reasons |= _weightless(listing.names, reasons) | _emptied(listing.names, reasons)
    left_out = {path: LeftOut(path=path, reason=reason) for path, reason in reasons.values()}
    return FolderFiles(
        anew=tuple(sorted(anew)),
        companions=tuple(sorted(name for name in listing.names if name not in read | reasons.keys())),
        left_out=tuple(left_out[path] for path in sorted(left_out)),
    )


def stated_weights(listing: Listing) -> frozenset[str]:
    """The files that transformers reads a model's weights from, according to its config and index."""
    config = listing.read_json(CONFIG_NAME)
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    first = named if isinstance(named, str) else SINGLE_NAME if SINGLE_NAME in listing.names else INDEX_NAME
    stated = listing.read_json(first) if first.endswith(".json") else None
    shards = stated.get("weight_map") if isinstance(stated, dict) else None
    files = shards.values() if isinstance(shards, dict) else ()
    return frozenset({first, *(file for file in files if isinstance(file, str))})


def _cut(path: str) -> tuple[str, str] | None:
    """The hidden part of a path, or a folder in it that copies the model, and why it is left out."""
    parts = path.split("/")
    for depth, part in enumerate(parts, start=1):
        is_folder = depth < len(parts)
        hidden = part.startswith(".") or part in CACHES or part.endswith("~")
        if hidden or (is_folder and COPY_FOLDERS.fullmatch(part)):
            cut = "/".join(parts[:depth]) + ("/" if is_folder else "")
            return _escaped(cut), HIDDEN if hidden else COPY
    return None


def _why_left_out(
    path: str, names: Collection[str], is_copy: Callable[[str], bool]
) -> tuple[str, str] | None:
    """The part of a path that is left out, and why; None for files that are kept."""
    folder, _, name = path.rpartition("/")
    suffix = os.path.splitext(name)[1].lower()
    if cut := _cut(path):
        return cut
    reason = None
    if not is_safe_path(path):
        reason = NO_FILE
    elif path.casefold() in ARTIFACT_NAMES or (path == CARD_NAME and ORIGINAL_CARD in names):
        reason = OWN
    elif ADAPTERS.fullmatch(name):
        reason = ADAPTER
    elif name in NEEDS_LEFT_OUT or (name == "params.json" and _beside(path, names, "consolidated")):
        reason = WEIGHTLESS
    elif OTHER_FORMATS.fullmatch(name) or _is_weights(name, suffix, at_root=not folder):
        reason = COPY
    elif suffix in PICKLE_SUFFIXES:
        reason = PICKLE
    elif suffix == ".safetensors" and is_copy(path):
        reason = COPY
    return None if reason is None else (_escaped(path), reason)


def _is_weights(name: str, suffix: str, *, at_root: bool) -> bool:
    """Whether a file that the model is not read from is named like weights or their index.

    Safetensors files below the root belong to other modules.
    """
    if INDEXES.fullmatch(name):
        return at_root or ".safetensors." not in name
    is_another = not at_root and suffix == ".safetensors" and not name.startswith("consolidated")
    is_weights = suffix == ".safetensors" or suffix in PICKLE_SUFFIXES
    return is_weights and not is_another and WEIGHT_NAMES.fullmatch(name) is not None


def _beside(path: str, names: Collection[str], start: str) -> bool:
    folder = path[: path.rfind("/") + 1]
    return any(name.startswith(folder + start) for name in names)


def _weightless(names: Collection[str], reasons: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Configs named after a pickle beside them: `vocoder_config.json` for `vocoder.pt`."""
    stems = [os.path.splitext(name)[0] for name, (_, reason) in reasons.items() if reason == PICKLE]
    parts = [(stem[: stem.rfind("/") + 1], stem.rpartition("/")[2]) for stem in stems]
    configs = {f"{folder}config_{stem}" for folder, stem in parts}
    configs |= {f"{stem}{joined}config" for stem in stems for joined in ("_", "-", ".")}
    found = [name for name in names if name.endswith((".json", ".yaml", ".yml"))]
    return {name: (_escaped(name), WEIGHTLESS) for name in found if os.path.splitext(name)[0] in configs}


def _emptied(names: Sequence[str], reasons: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The files of sub-folders that lose all their weights: a config is not kept without its weights."""
    kept = [name for name in names if name.endswith(".safetensors") and name not in reasons]
    folders = {
        f"{name.rpartition('/')[0]}/": reason
        for name, (cut, reason) in reasons.items()
        if reason in (COPY, ADAPTER, PICKLE) and "/" in name and not cut.endswith("/")
    }
    configs = {f"{name.rpartition('/')[0]}/" for name in names if name.endswith(f"/{CONFIG_NAME}")}
    folders = {folder: reason for folder, reason in folders.items() if reason != PICKLE or folder in configs}
    emptied = sorted(folder for folder in folders if not any(name.startswith(folder) for name in kept))
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        above = next((folder for folder in emptied if name.startswith(folder)), None)
        if above is not None and not reasons.get(name, ("", ""))[0].endswith("/"):
            found[name] = (_escaped(above), folders[above])
    return found


def _escaped(path: str) -> str:
    """The path, escaped if it cannot be printed."""
    return path if path.isprintable() else path.encode("unicode_escape").decode("ascii")


def left_out_in_one_line(left_out: Sequence[LeftOut]) -> str | None:
    """What is left out of an artifact, and why; None if nothing is."""
    parts = []
    for reason in dict.fromkeys(each.reason for each in left_out):
        paths = [each.path for each in left_out if each.reason == reason]
        more = f" and {len(paths) - MOST_SHOWN} more" if len(paths) > MOST_SHOWN else ""
        parts.append(f"{', '.join(paths[:MOST_SHOWN])}{more} ({reason})")
    return f"left out of the artifact: {'; '.join(parts)}" if parts else None


def local_listing(directory: Path) -> Listing:
    """The files below a directory, following links. If it is not a model, enough files to tell what it is.

    Raises ConfigError for broken or circular links, and for folders that cannot be read.
    """
    names: list[str] = []
    others: list[str] = []
    is_model = (directory / CONFIG_NAME).is_file()
    chains: dict[str, tuple[str, ...]] = {str(directory): (os.path.realpath(directory),)}
    walk = os.walk(directory, followlinks=is_model, onerror=_cannot_read if is_model else None)
    for folder, children, files in walk:
        above = os.path.relpath(folder, directory).replace(os.sep, "/")
        prefix = "" if above == "." else f"{above}/"
        hidden = [child for child in children if _cut(f"{prefix}{child}/")]
        children[:] = sorted(set(children) - set(hidden))
        names += [f"{prefix}{child}/" for child in hidden]
        for child in children:
            path = os.path.join(folder, child)
            real = os.path.realpath(path)
            if is_model and real in chains[folder]:
                raise ConfigError(f"{path} links to a folder that contains it: remove the link")
            chains[path] = (*chains[folder], real)
        for name in sorted(files):
            path = os.path.join(folder, name)
            if is_model and not os.path.exists(path) and not _cut(prefix + name):
                raise ConfigError(f"{path} links to a file that does not exist: put the file there")
            (names if os.path.isfile(path) else others).append(prefix + name)
        if not is_model and len(names) > MOST_NAMES:
            break
    return Listing(str(directory), tuple(names), lambda name: (directory / name).read_bytes(), tuple(others))


def _cannot_read(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class ModelFolder:
    """A model's local folder, as it was when it was listed."""

    directory: Path
    files: FolderFiles
    stamps: Mapping[str, tuple[int, int]]
    """Size and modification time of each file."""

    @classmethod
    def look_at(
        cls, directory: Path, *, weights: Collection[str], is_copy: Callable[[str], bool]
    ) -> ModelFolder:
        """List a folder. Raises ConfigError when names differ only in case, or a file cannot be read."""
        files = sort_files(local_listing(directory), weights=weights, is_copy=is_copy)
        if twin := colliding((CONFIG_NAME, *_targets(files.companions).values())):
            raise ConfigError(f"{directory}: two file names differ only in case, {twin}: rename one of them")
        return cls(directory, files, {name: _stamp(directory / name) for name in files.wanted})

    @property
    def license(self) -> str | None:
        """The licence that the model card's front matter names."""
        named = read_card(self.directory).strings("license")
        return ", ".join(named) or None

    @property
    def companion_bytes(self) -> int:
        return sum(self.stamps[name][0] for name in self.files.companions)

    def copy_companions(self, directory: Path) -> None:
        """Copy the companions. Raises ArtifactError when a file changed since the run began."""
        for name, target in _targets(self.files.companions).items():
            (directory / target).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.directory / name, directory / target)
            except FileNotFoundError:
                break
        for name, stamp in self.stamps.items():
            if _stamp(self.directory / name) != stamp:
                raise ArtifactError(
                    f"{self.directory / name} changed during the run: run again and leave the folder as it is"
                )


def _targets(companions: Iterable[str]) -> dict[str, str]:
    """The companions' names in the artifact, by their own names."""
    return {name: ORIGINAL_CARD if name.casefold() == CARD_NAME.casefold() else name for name in companions}


def _stamp(path: Path) -> tuple[int, int]:
    """Size and modification time; zeros for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)


def check_no_pointers(directory: Path, names: Iterable[str]) -> None:
    """Raise ConfigError for a Git LFS pointer in place of a file that was not fetched."""
    for name in names:
        path = directory / name
        if DOCUMENTS.fullmatch(name) or not 0 < _stamp(path)[0] < 1024:
            continue
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ConfigError(
                    f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in {directory}"
                )
