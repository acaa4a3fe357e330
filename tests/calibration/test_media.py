"""Pairs of texts, pictures and sounds, from every form that a spec may have; and specs that are none."""

from __future__ import annotations

import base64
import io
import json
import sys
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from ffsplit.calibration.media import decode_sound, embedded, read_media, read_pairs
from ffsplit.calibration.readers import _image
from ffsplit.errors import ConfigError
from ffsplit.models.family import Media


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), shade).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [png(shade) for shade in (0, 100, 200)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures as files below a folder, and named by files of every form."""
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    names = ["pictures/a.png", "pictures/b.JPG", "pictures/more/c.webp"]
    for name, content in zip(names, PICTURES, strict=True):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "list.csv").write_text("picture,text\n" + "".join(f"{name},words\n" for name in names))
    columns = {
        "bytes": PICTURES,
        "record": [{"bytes": content, "path": None} for content in PICTURES],
        "path": names,
        "text": ["words"] * 3,
    }
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    return tmp_path


@pytest.mark.parametrize(
    "spec",
    ["pictures", "list.csv#picture", "table.parquet#bytes", "table.parquet#record", "table.parquet#path"],
)
def test_pictures_from_every_form(folder: Path, spec: str) -> None:
    rows = read_media([f"{folder}/{spec}"], reads=("image",))
    assert [base64.b64decode(json.loads(embedded(row, reads=("image",)))[0]) for row in rows] == PICTURES
    assert all(len(row) < 500 for row in rows)  # named until they are sampled


@pytest.mark.parametrize("spec", ["list.csv#picture,text", "table.parquet#record,text"])
def test_a_text_beside_each_picture(folder: Path, spec: str) -> None:
    reads: Media = ("image", "text")
    rows = [json.loads(embedded(row, reads=reads)) for row in read_media([f"{folder}/{spec}"], reads=reads)]
    assert [base64.b64decode(content) for content, _ in rows] == PICTURES
    assert {text for _, text in rows} == {"words"}


@pytest.mark.parametrize(
    ("spec", "reads", "complaint"),
    [
        ("pictures/more", ("sound",), "the folder holds no sound: .wav"),
        ("pictures", ("image", "text"), "the folder needs a captions.jsonl"),
        ("none", ("image", "text"), "this model reads images; name a folder with a captions.jsonl"),
        ("none", ("image",), "name a folder, FILE.parquet#COLUMN or FILE.csv"),
        ("table.parquet", ("image",), r"name 1 column\(s\)"),
        ("table.parquet#bytes", ("image", "text"), r"name 2 column\(s\)"),
        ("table.parquet#other", ("image",), "other"),
        ("gone.parquet#bytes", ("image",), "not a Parquet file"),
    ],
)
def test_specs_that_name_no_media(folder: Path, spec: str, reads: Media, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_media([f"{folder}/{spec}"], reads=reads)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_not_there_or_is_none(folder: Path) -> None:
    rows = read_media([f"{folder}/list.csv#picture"], reads=("image",))
    (folder / "pictures" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"pictures/a\.png cannot be decoded as a picture: remove it"):
        embedded(rows[0], reads=("image",))
    with pytest.raises(ConfigError, match="a calibration picture cannot be decoded"):
        _image(base64.b64encode(b"no picture").decode())
    (folder / "pictures" / "a.png").unlink()
    with pytest.raises(ConfigError, match=r"a\.png"):
        embedded(rows[0], reads=("image",))


@pytest.mark.parametrize(("value", "what"), [(None, "nothing"), ([{"bytes": PICTURES[0]}], "a list")])
def test_a_row_of_none_or_of_several_pictures_is_named(tmp_path: Path, value: object, what: str) -> None:
    kind = pa.list_(pa.struct([("bytes", pa.binary())])) if value else pa.binary()
    pq.write_table(pa.table({"image": pa.array([value], kind)}), tmp_path / "odd.parquet")
    (row,) = read_media([f"{tmp_path}/odd.parquet#image"], reads=("image",))
    with pytest.raises(ConfigError, match=rf"odd.parquet, row 0 of 'image', holds {what}, not one file"):
        embedded(row, reads=("image",))


def test_a_sound_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no sound")
    (row,) = read_media([str(tmp_path)], reads=("sound",))
    with pytest.raises(ConfigError, match=r"a\.wav cannot be decoded as a sound.*; remove it"):
        embedded(row, reads=("sound",))


def test_pairs_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("source,target\na,b\n,nothing\nc,d\n")
    assert [json.loads(row) for row in read_pairs([f"{path}#source,target"])] == [["a", "b"], ["c", "d"]]
    assert json.loads(read_pairs([f"{path}#target"])[0]) == ["b", "b"]
    with pytest.raises(ConfigError, match="name two columns at most"):
        read_pairs([f"{path}#source,target,more"])
    with pytest.raises(ConfigError, match="its columns differ in length"):
        read_pairs([f"{path}#0,target"])  # a number counts the header as a row, a name does not
    path.write_text("source,target\na,\n,b\n")
    with pytest.raises(ConfigError, match="no row has both texts"):
        read_pairs([f"{path}#source,target"])


@pytest.mark.parametrize(("width", "dtype"), [(1, np.uint8), (2, np.int16), (4, np.int32)])
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_of_every_width_at_the_models_rate(width: int, dtype: type, channels: int) -> None:
    """A tone of a quarter of full scale, at half the rate that is wanted."""
    tone = 0.25 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    whole = tone * 2.0 ** (8 * width - 1) + (128 if width == 1 else 0)
    file = io.BytesIO()
    with wave.open(file, "wb") as target:
        target.setparams((channels, width, 8000, 0, "NONE", ""))
        target.writeframes(np.repeat(whole.astype(dtype), channels).tobytes())
    found = decode_sound(file.getvalue(), rate=16000)
    assert found.shape == (8000,) and found.dtype == np.float32
    assert np.abs(found).max() == pytest.approx(0.25, abs=0.02)


def test_a_sound_at_the_models_rate_is_left_as_it_is() -> None:
    samples = np.array([0, 16384, -32768, 1], dtype=np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as target:
        target.setparams((1, 2, 16000, 0, "NONE", ""))
        target.writeframes(samples.tobytes())
    assert decode_sound(file.getvalue(), rate=16000).tolist() == (samples / 32768).tolist()


def test_a_sound_that_is_no_wav() -> None:
    tone = 0.25 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone, 3 * tone], axis=1), 16000, format="FLAC")
    np.testing.assert_allclose(decode_sound(file.getvalue(), rate=16000), 2 * tone, atol=1e-4)


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"pictures need Pillow: pip install 'ffsplit\[image\]'"):
        _image(base64.b64encode(b"any").decode())
    with pytest.raises(ConfigError, match=r"sound needs soundfile: pip install 'ffsplit\[audio\]'"):
        decode_sound(b"any", rate=16000)


def test_a_sound_that_is_none() -> None:
    with pytest.raises(ConfigError, match="a sound cannot be decoded"):
        decode_sound(b"no sound", rate=16000)
