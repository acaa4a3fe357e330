"""Rows of pictures, sounds, videos and pairs of texts: named first, read whole only once they are sampled."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffsplit.calibration.sources import (
    checked_text,
    decoded,
    json_records,
    parquet_column,
    read_column,
    reading_texts,
    source_error,
    table_rows,
)
from ffsplit.errors import ConfigError, explained
from ffsplit.models.family import Architecture, Media, Medium


def decode_sound(data: bytes, *, rate: int) -> NDArray[np.float32]:
    """Mono samples in [-1, 1] at `rate` per second. Raises ConfigError for what cannot be decoded."""
    try:
        import soundfile
    except ImportError:
        raise ConfigError("reading sound needs soundfile: pip install 'ffsplit[audio]'") from None
    with explained("a sound cannot be decoded"):
        channels, found_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    samples = channels.mean(axis=1)
    if found_rate != rate:
        from scipy.signal import resample_poly

        with explained(f"a sound of {found_rate} samples a second cannot be brought to {rate}"):
            divisor = math.gcd(found_rate, rate)
            samples = resample_poly(samples, rate // divisor, found_rate // divisor)
    return np.asarray(samples, dtype=np.float32)


SUFFIXES: dict[Medium, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    "sound": (".wav", ".flac", ".ogg", ".mp3"),
}
SOUND_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb")
"""First bytes of sound files."""
CAPTIONS = ("captions.jsonl", "metadata.jsonl")
"""Files in a folder that state the text of each picture or sound; the second is Hugging Face's name."""
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")


def read_pairs(specs: Sequence[str]) -> list[str]:
    """Rows of a source and its target from `file.csv#source,target` and the like, as JSON lists.

    A spec that names one column, or none, gives texts that are their own targets.
    """
    rows = []
    for spec in specs:
        start, mark, column, end = _columns(spec)
        if len(column) > 2:
            raise source_error(spec, "name two columns at most: SOURCE,TARGET")
        texts = [read_column(f"{start}{mark}{each}{end}") for each in column]
        if len(texts[0]) != len(texts[-1]):
            raise source_error(spec, "its columns differ in length")
        pairs = zip(texts[0], texts[-1], strict=True)
        found = [json.dumps([a.strip(), b.strip()]) for a, b in pairs if a.strip() and b.strip()]
        if not found:
            raise source_error(spec, "no row has both texts; name other columns")
        rows += found
    return rows


def _columns(spec: str) -> tuple[str, str, list[str], str]:
    """`file.csv#a,b` as (file.csv, #, [a, b], nothing); after an @ comes a hub dataset's split."""
    start, mark, rest = spec.partition("#")
    column, at, split = rest.rpartition("@") if start.startswith("hf:") else (rest, "", "")
    return start, mark, column.split(","), at + split


def media_given(specs: Sequence[str], *, architecture: Architecture) -> Media:
    """What the rows of some sources hold, for a family that may read more than it must.

    Looks at the first row of each source. Raises ConfigError when they differ.
    """
    if not architecture.may_read:
        return architecture.reads
    found = {_medium_in(spec, architecture.may_read) for spec in specs}
    if len(found) > 1:
        raise ConfigError("--calibration: all sources must hold texts alone, or all of them a medium beside")
    (medium,) = found
    return architecture.reads if medium is None else (medium, *architecture.reads)


def _medium_in(spec: str, among: Media) -> Medium | None:
    """The medium beside the texts of a source; None if it holds texts alone."""
    start, _, columns, _ = _columns(spec)
    path = Path(start)
    if path.is_dir():
        names = [row[0] for row in _captioned(spec, path)[:1]]
    elif len(columns) == 2 and path.suffix.lower() in TABLES:
        names = _names(start, path, columns[0])[:1]
    else:
        return None
    for name in names:
        for medium in among:
            if name.lower().endswith(SUFFIXES.get(medium, ())):
                return medium
        if "#" in name and {"image", "sound"} & set(among):
            is_sound = _content(name).startswith(SOUND_STARTS)
            return "sound" if is_sound and "sound" in among else "image" if "image" in among else None
    return None


def read_media(specs: Sequence[str], *, reads: Media) -> list[str]:
    """Rows that name a picture, a sound or a video's frames, and hold the text beside it if `reads` has one.

    A spec is a folder, `file.parquet#column`, or `file.csv#column` with paths relative to the file; a
    second column after a comma is the text. In a folder, captions.jsonl states the texts, and a video is a
    folder of its frames. Raises ConfigError for a spec that is none of these.
    """
    (medium,) = (each for each in reads if each != "text")
    return [json.dumps(row) for spec in specs for row in _read(spec, medium, has_text="text" in reads)]


def _read(spec: str, medium: Medium, *, has_text: bool) -> list[list[Any]]:
    start, _, columns, _ = _columns(spec)
    path = Path(start)
    if path.is_dir():
        return _captioned(spec, path) if has_text else _in_folder(spec, path, medium)
    if medium == "video":
        raise source_error(
            spec, "this model reads videos; name a folder that holds a folder of frames for each"
        )
    form = "FILE.parquet#" + ("COLUMN,TEXT" if has_text else "COLUMN")
    if path.suffix.lower() not in TABLES:
        folder = f"a folder with a {CAPTIONS[0]}" if has_text else "a folder"
        raise source_error(spec, f"this model reads {medium}s; name {folder}, {form} or FILE.csv#...")
    if len(columns) != 1 + has_text or not all(columns):
        raise source_error(spec, f"name {1 + has_text} column(s): {form}")
    texts = [read_column(f"{start}#{each}") for each in columns[1:]]
    return [list(row) for row in zip(_names(start, path, columns[0]), *texts, strict=True)]


def _names(start: str, path: Path, column: str) -> list[str]:
    """The pictures or sounds of a column: paths, or places in a Parquet file."""
    if path.suffix.lower() == ".parquet":
        return [f"{path.resolve()}#{column}@{row}" for row in range(len(_parquet_column(start, column)))]
    return [str((path.parent / each).resolve()) for each in read_column(f"{start}#{column}")]


def _captioned(spec: str, folder: Path) -> list[list[Any]]:
    """The files that a folder's captions name, each with its text."""
    path = next((folder / name for name in CAPTIONS if (folder / name).is_file()), None)
    if path is None:
        line = '{"file": "a.png", "text": "..."}'
        raise source_error(spec, f"the folder needs a {CAPTIONS[0]} with the texts, each line {line}")
    ((_, first), *_) = json_records(decoded(spec, path), path)
    fields = ("file_name" if "file_name" in first else "file", "text")
    rows = table_rows(spec, path, fields)
    return [
        [str((folder / checked_text(where, fields[0], name)).resolve()), checked_text(where, "text", text)]
        for where, (name, text) in rows
    ]


def _in_folder(spec: str, folder: Path, medium: Medium) -> list[list[Any]]:
    """The pictures or sounds in a folder and below it; for videos, the frames of each folder in it."""
    kind: Medium = "image" if medium == "video" else medium
    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES[kind])
    if not files:
        raise source_error(spec, f"the folder holds no {kind}: {', '.join(SUFFIXES[kind])}")
    if medium != "video":
        return [[str(each.resolve())] for each in files]
    videos: dict[Path, list[str]] = {}
    for each in files:
        videos.setdefault(each.parent, []).append(str(each.resolve()))
    return [[frames] for frames in videos.values()]


def embedded(row: str, *, reads: Media) -> str:
    """The row with the bytes of its picture, sound or frames in the place of their names.

    Raises ConfigError, with the name, for what is no picture or sound.
    """
    named, *text = json.loads(row)
    if isinstance(named, list):
        return json.dumps([[_encoded(each, reads) for each in named], *text])
    return json.dumps([_encoded(named, reads), *text])


def _encoded(name: str, reads: Media) -> str:
    data = _content(name)
    _check_decodes(name, data, is_sound="sound" in reads)
    return base64.b64encode(data).decode()


def _check_decodes(name: str, data: bytes, *, is_sound: bool) -> None:
    """Read the header of a picture or sound. Without the library that reads it, the reader reports that."""
    with suppress(ImportError):
        if is_sound:
            import soundfile

            with explained(f"{name} cannot be decoded as a sound", advice="remove it"):
                soundfile.info(io.BytesIO(data))
        else:
            from PIL import Image

            try:
                Image.open(io.BytesIO(data)).verify()
            except Exception:
                raise ConfigError(f"{name} cannot be decoded as a picture: remove it") from None


def _content(name: str) -> bytes:
    path, mark, rest = name.rpartition("#")
    if mark and path.endswith(".parquet"):
        column, _, row = rest.rpartition("@")
        value = _parquet_column(path, column)[int(row)].as_py()
        value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            what = "nothing" if value is None else f"a {type(value).__name__}"
            raise ConfigError(f"{path}, row {row} of {column!r}, holds {what}, not one file: remove it")
        name = str(Path(path).parent / value)
    with reading_texts(name):
        return Path(name).read_bytes()


@lru_cache(maxsize=4)
def _parquet_column(path: str, column: str) -> Any:
    return parquet_column(f"{path}#{column}", Path(path), column)
