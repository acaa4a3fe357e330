"""`ffsplit export`: an artifact in another format, with its tokenizer beside it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal

from ffsplit.artifacts.paths import check_outside_attempts
from ffsplit.artifacts.pull import materialize
from ffsplit.errors import ConfigError
from ffsplit.home import user_path
from ffsplit.models.checkpoint import tokenizer_files

ExportFormat = Literal["onnx"]


def export(uri: str, *, format: ExportFormat, out: Path) -> Path:
    """Write the artifact, or the dense model, at `uri` into the new directory `out`; returns its main file.

    Raises ConfigError where `out` has something in it, the extra is missing, or the format cannot hold
    the model; then nothing is written.
    """
    from ffsplit.runtime.onnx_export import FILE_NAME, export_onnx

    check_outside_attempts(out.resolve().as_posix(), flag="--out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already and is not an empty directory")
    local = user_path(uri)
    is_checkpoint = (local / "config.json").is_file() and not (local / "manifest.json").is_file()
    directory = local if is_checkpoint else materialize(uri)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        whole = Path(folder) / "out"
        whole.mkdir()
        export_onnx(directory, whole / FILE_NAME)
        for name in ("config.json", *tokenizer_files(directory)):
            shutil.copyfile(directory / name, whole / name)
        if out.exists():
            out.rmdir()
        whole.rename(out)
    return out / FILE_NAME
