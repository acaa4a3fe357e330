"""Rows of pictures or sounds with texts, through the real processors of tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families.tiny import model_types, save, tiny_model
from ffsplit.calibration.media import embedded, media_given, read_media
from ffsplit.calibration.model_inputs import Batch
from ffsplit.calibration.readers import make_reader
from ffsplit.errors import ConfigError
from ffsplit.measurement.fidelity import token_logits
from ffsplit.models.checkpoint import Checkpoint, open_checkpoint
from ffsplit.models.load import load_whole_model
from ffsplit.models.selection import chosen
from tests.tiny_rows import calibration, richest_reads

TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}of <image> to {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("llava")`: a tiny checkpoint with a joint processor, made once."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            directory = tmp_path_factory.mktemp(model_type)
            model = tiny_model(model_type, model_types()[model_type])
            assert save(model, directory) in ("", "it reads no text")
            made[model_type] = directory
        return made[model_type]

    return make


def with_media(directory: Path) -> Checkpoint:
    return open_checkpoint(directory, reads=richest_reads(open_checkpoint(directory)))


def batches_of(checkpoint: Checkpoint, folder: Path, *, max_length: int = 16) -> list[Batch]:
    rows = read_media([calibration(checkpoint, folder)], reads=checkpoint.reads)
    reader = make_reader(checkpoint, max_length=max_length, batch_tokens=64)
    return list(reader.batches(reader.encode([embedded(row, reads=checkpoint.reads) for row in rows])))


def test_rows_for_the_vision_tower_alone_are_those_for_all_towers(saved: Saved, tmp_path: Path) -> None:
    """The language model reads them too, with a mask: they are not padded to its maximum length."""
    both = with_media(saved("llava"))
    vision = chosen(both, only=("vision*",), skip=())
    assert {ffn.tower.mask for ffn in vision.ffns} == {None}
    for one, other in zip(batches_of(both, tmp_path), batches_of(vision, tmp_path), strict=True):
        assert one.arguments.keys() == other.arguments.keys()
        assert all(torch.equal(one.arguments[name], other.arguments[name]) for name in one.arguments)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "blip", "gemma3", "paligemma", "qwen2_audio"])
def test_every_place_of_a_picture_is_marked_and_the_model_runs(
    saved: Saved, tmp_path: Path, family: str
) -> None:
    checkpoint = with_media(saved(family))
    first, second = batches_of(checkpoint, tmp_path)
    assert (first.num_rows, second.num_rows) == (8, 4)
    assert next(iter(first.arguments)) == "input_ids" and first.is_text is not None
    model = load_whole_model(checkpoint.directory, checkpoint.class_name)
    with torch.no_grad():
        logits = token_logits(model, first)
    assert logits.shape[:2] == first.input_ids.shape
    assert logits[first.is_text & first.attention_mask.bool()].isfinite().all()
    places = (~first.is_text & first.attention_mask.bool()).sum(1)
    assert (places == 0).all() if family == "blip" else (places > 0).all()


def test_a_text_is_cut_and_its_picture_is_not(saved: Saved, tmp_path: Path) -> None:
    checkpoint = with_media(saved("llava"))
    long, short = (batches_of(checkpoint, tmp_path, max_length=length)[0] for length in (16, 5))
    assert long.is_text is not None and short.is_text is not None
    assert torch.equal((~long.is_text).sum(1), (~short.is_text).sum(1))
    assert int((short.is_text & short.attention_mask.bool()).sum(1).max()) <= 5
    assert short.input_ids.shape[1] < long.input_ids.shape[1]


def test_a_chat_template_says_where_the_picture_is(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved("llava"), directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    checkpoint = with_media(directory)
    reader = make_reader(checkpoint, max_length=16, batch_tokens=64)
    assert reader._prompts._prompt("the", "") == "of <image> to the"  # type: ignore[attr-defined]
    (first, _) = batches_of(checkpoint, tmp_path)
    (plain, _) = batches_of(with_media(saved("llava")), tmp_path)
    assert first.input_ids.shape[1] == plain.input_ids.shape[1] + 2


def test_a_decoder_reads_the_text_beside_a_picture(saved: Saved, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("vision-encoder-decoder"))
    (first, _) = batches_of(checkpoint, tmp_path)
    assert set(first.arguments) == {"decoder_input_ids", "decoder_attention_mask", "pixel_values"}
    ids, follows = first.predicted
    assert torch.equal(ids, first.arguments["decoder_input_ids"])
    assert not follows[:, 0].any() and follows[:, 1:].any()


def test_frames_of_a_folder_are_a_video(saved: Saved, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("videomae"))
    assert checkpoint.reads == ("video",)
    (first, _) = batches_of(checkpoint, tmp_path)
    assert first.arguments["pixel_values"].shape[:2] == (8, 4)


def test_places_of_pictures_are_not_predicted() -> None:
    ids, mask = torch.arange(6).reshape(1, 6), torch.tensor([[0, 1, 1, 1, 1, 1]])
    is_text = torch.tensor([[True, True, False, False, True, True]])
    _, follows = Batch({"input_ids": ids, "attention_mask": mask}, is_text).predicted
    assert follows.tolist() == [[False, False, False, False, True, True]]


def captions(folder: Path, name: str, field: str) -> str:
    (folder / "a.png").write_bytes(b"picture")
    row: dict[str, Any] = {field: "a.png", "text": "some words"}
    (folder / name).write_text(json.dumps(row) + "\n")
    return str(folder)


@pytest.mark.parametrize(("name", "field"), [("captions.jsonl", "file"), ("metadata.jsonl", "file_name")])
def test_captions_in_a_folder(saved: Saved, tmp_path: Path, name: str, field: str) -> None:
    spec = captions(tmp_path, name, field)
    (row,) = read_media([spec], reads=("image", "text"))
    assert json.loads(row) == [str(tmp_path / "a.png"), "some words"]
    architecture = open_checkpoint(saved("llava")).architecture
    assert media_given([spec], architecture=architecture) == ("image", "text")


def test_the_sources_tell_what_a_model_reads(saved: Saved, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved("llava"))
    architecture = checkpoint.architecture
    texts, pictures = calibration(checkpoint, tmp_path), calibration(checkpoint, tmp_path, richest=True)
    assert media_given([texts], architecture=architecture) == ("text",)
    assert media_given([pictures], architecture=architecture) == ("image", "text")
    with pytest.raises(ConfigError, match="all sources must hold texts alone"):
        media_given([texts, pictures], architecture=architecture)
