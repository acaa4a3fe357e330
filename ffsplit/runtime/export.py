"""`ffsplit export`: an artifact in another format, with the model's other files beside it."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from ffsplit.directories import user_path
from ffsplit.errors import ConfigError, explained
from ffsplit.models.folder import CONFIG_NAME, local_listing, sort_files
from ffsplit.store.entries import check_outside_attempts
from ffsplit.store.manifest import MANIFEST_NAME
from ffsplit.store.pull import materialize

ExportFormat = Literal["onnx"]

ONNX_FOLDER = "onnx"
"""The subfolder of a model in which sentence-transformers looks for graphs."""
SENTENCE_MODULES = "modules.json"


def export(uri: str, *, format: ExportFormat, out: Path) -> Path:
    """Write the artifact, or the dense model, at `uri` into the new directory `out`. Returns its main file.

    The config, the tokenizer and the modules of sentence-transformers are copied beside it, so that the new
    directory is read like the old. Raises ConfigError, with nothing written, if `out` is not empty, the extra
    is missing, or the format cannot hold the model.
    """
    from ffsplit.runtime.onnx import FILE_NAME, export_onnx

    check_outside_attempts(out.resolve().as_posix(), flag="--out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already and is not an empty directory")
    local = user_path(uri)
    is_checkpoint = (local / "config.json").is_file() and not (local / MANIFEST_NAME).is_file()
    directory = local if is_checkpoint else materialize(uri)
    graph = Path(ONNX_FOLDER if (directory / SENTENCE_MODULES).is_file() else "", FILE_NAME)
    with ExitStack() as stack:
        with explained(f"--out {out} cannot be written"):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-"))
        whole = Path(folder) / "out"
        (whole / graph).parent.mkdir(parents=True)
        export_onnx(directory, whole / graph)
        _copy_companions(directory, whole)
        whole.rename(out)  # also replaces an empty directory
    return out / graph


def _copy_companions(source: Path, target: Path) -> None:
    """Copy the config and every other file except weights, graphs and records of a run."""
    for name in (CONFIG_NAME, *sort_files(local_listing(source)).companions):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
