"""Rows of pictures, sounds and pairs of texts: named first, read whole only once they are sampled."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffsplit.calibration.sources import parquet_column, read_column, reading_texts, source_error
from ffsplit.errors import ConfigError, explained
from ffsplit.models.family import ModelKind


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


SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    "sound": (".wav", ".flac", ".ogg", ".mp3"),
}


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


def read_media(specs: Sequence[str], *, kind: ModelKind) -> list[str]:
    """Rows that name a picture or a sound, and hold the text beside it where the kind of model reads one.

    A spec is a folder, `file.parquet#column`, or `file.csv#column` with paths relative to the file; a
    second column after a comma is the text. Raises ConfigError for a spec that is none of these.
    """
    medium = "image" if kind.startswith("image") else "sound"
    has_text = kind in ("image_text", "speech")
    return [json.dumps(row) for spec in specs for row in _read(spec, medium, has_text=has_text)]


def _read(spec: str, medium: str, *, has_text: bool) -> list[list[str]]:
    start, _, columns, _ = _columns(spec)
    path = Path(start)
    wanted = 2 if has_text else 1
    form = "FILE.parquet#" + ("COLUMN,TEXT" if has_text else "COLUMN")
    if path.is_dir() and not has_text:
        files = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES[medium])
        if not files:
            raise source_error(spec, f"the folder holds no {medium}: {', '.join(SUFFIXES[medium])}")
        return [[str(each.resolve())] for each in files]
    if path.suffix.lower() not in (".parquet", ".csv", ".tsv", ".jsonl"):
        other = "" if has_text else "a folder, "
        raise source_error(spec, f"this model reads {medium}s; name {other}{form} or FILE.csv#...")
    if len(columns) != wanted or not all(columns):
        raise source_error(spec, f"name {wanted} column(s): {form}")
    texts = [read_column(f"{start}#{each}") for each in columns[1:]]
    if path.suffix.lower() == ".parquet":
        count = len(_parquet_column(start, columns[0]))
        media = [f"{path.resolve()}#{columns[0]}@{row}" for row in range(count)]
    else:
        media = [str((path.parent / each).resolve()) for each in read_column(f"{start}#{columns[0]}")]
    return [list(row) for row in zip(media, *texts, strict=True)]


def embedded(row: str) -> str:
    """The row with the bytes of its picture or sound in the place of their name."""
    name, *text = json.loads(row)
    return json.dumps([base64.b64encode(_content(name)).decode(), *text])


def _content(name: str) -> bytes:
    path, mark, rest = name.rpartition("#")
    if mark and path.endswith(".parquet"):
        column, _, row = rest.rpartition("@")
        value = _parquet_column(path, column)[int(row)].as_py()
        value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if isinstance(value, bytes):
            return value
        name = str(Path(path).parent / str(value))
    with reading_texts(name):
        return Path(name).read_bytes()


@lru_cache(maxsize=4)
def _parquet_column(path: str, column: str) -> Any:
    return parquet_column(f"{path}#{column}", Path(path), column)
