"""A few rows of calibration data of each kind that a model may read."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.family import Media
from tests.tiny_models import WORDS

NUM_ROWS = 12


def calibration(checkpoint: Checkpoint, folder: Path, *, richest: bool = False) -> str:
    """Write a few rows of what a model reads. Returns them as `--calibration` takes them.

    `richest`: with the first medium beside text that it may read.
    """
    reads = richest_reads(checkpoint) if richest else checkpoint.reads
    texts = [" ".join(WORDS[index : index + 6]) for index in range(NUM_ROWS)]
    if reads != ("text",):
        return MAKERS[reads](texts, folder)
    if checkpoint.makes == "target":
        return _pairs(texts, folder)
    (folder / "rows.txt").write_text("\n".join(texts), "utf-8")
    return str(folder / "rows.txt")


def richest_reads(checkpoint: Checkpoint) -> Media:
    """What a row of the richest data holds that a model reads."""
    return (*checkpoint.architecture.may_read[:1], *checkpoint.reads)


def _pairs(texts: list[str], folder: Path) -> str:
    pairs = zip(texts, reversed(texts), strict=True)
    (folder / "pairs.csv").write_text("source,target\n" + "\n".join(map(",".join, pairs)), "utf-8")
    return f"{folder}/pairs.csv#source,target"


def _images(texts: list[str], folder: Path) -> str:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    for index in range(len(texts)):
        pixels = generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    return str(folder / "images")


def _captions(texts: list[str], folder: Path) -> str:
    _images(texts, folder)
    rows = [f"images/{index}.png,{text}" for index, text in enumerate(texts)]
    (folder / "captions.csv").write_text("image,text\n" + "\n".join(rows), "utf-8")
    return f"{folder}/captions.csv#image,text"


def _sounds(texts: list[str], folder: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"sound": [{"bytes": each, "path": None} for each in _noise(len(texts))], "text": texts}
    pq.write_table(pa.table(table), folder / "sounds.parquet")
    return f"{folder}/sounds.parquet#sound"


def _speech(texts: list[str], folder: Path) -> str:
    return f"{_sounds(texts, folder)},text"


def _noise(number: int) -> Iterator[bytes]:
    """Half a second of noise each, as WAV files."""
    import numpy as np

    for seed in range(number):
        samples = np.random.default_rng(seed).integers(-20000, 20000, 4000, dtype=np.int16)
        target = io.BytesIO()
        with wave.open(target, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(samples.tobytes())
        yield target.getvalue()


def _videos(texts: list[str], folder: Path) -> str:
    """Four frames each, in a folder of their own."""
    for index in range(len(texts)):
        frames = folder / "videos" / str(index)
        frames.mkdir(parents=True, exist_ok=True)
        _images(["", "", "", ""], frames)
    return str(folder / "videos")


MAKERS: dict[Media, Callable[[list[str], Path], str]] = {
    ("image",): _images,
    ("image", "text"): _captions,
    ("sound",): _sounds,
    ("sound", "text"): _speech,
    ("video",): _videos,
}
