"""What models read and make, and what is said of those that no rows can be given to."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families.tiny import model_types, save, tiny_model
from ffsplit.errors import UnsupportedModelError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.family import Media
from ffsplit.models.load import check_arguments

TEXT, PICTURES, SOUND = ("text",), ("image",), ("sound",)


@pytest.mark.parametrize(
    ("family", "reads", "may_read", "makes"),
    [
        ("llava", TEXT, PICTURES, "next_tokens"),
        ("qwen2_audio", TEXT, SOUND, "next_tokens"),
        ("blip", PICTURES + TEXT, (), "next_tokens"),
        ("flava", PICTURES + TEXT, (), "embeddings"),
        ("clap", SOUND + TEXT, (), "embeddings"),
        ("vilt", TEXT, PICTURES, "states"),
        ("florence2", TEXT, PICTURES, "target"),
        ("vision-encoder-decoder", PICTURES + TEXT, (), "target"),
        ("pix2struct", PICTURES + TEXT, (), "target"),
        ("speecht5", SOUND + TEXT, (), "target"),
        ("speech-encoder-decoder", SOUND + TEXT, (), "target"),
        ("idefics3_vision", PICTURES, (), "states"),
        ("videomae", ("video",), (), "states"),
    ],
)
def test_a_model_reads_what_its_forward_takes(
    tmp_path: Path, family: str, reads: Media, may_read: Media, makes: str
) -> None:
    tiny_model(family, model_types()[family]).save_pretrained(tmp_path)
    row = open_checkpoint(tmp_path).architecture
    assert (row.reads, row.may_read, row.makes) == (reads, may_read, makes)


def test_a_part_of_a_model_names_its_whole(tmp_path: Path) -> None:
    tiny_model("qwen3_vl_vision", model_types()["qwen3_vl_vision"]).save_pretrained(tmp_path)
    expected = "reads hidden_states and grid_thw, .*; compress the qwen3_vl that it is a part of, with --only"
    with pytest.raises(UnsupportedModelError, match=expected):
        open_checkpoint(tmp_path)


def test_arguments_that_no_row_gives_are_named(tmp_path: Path) -> None:
    tiny_model("glm_image_vision", model_types()["glm_image_vision"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"reads grid_thw, .* compress the glm_image"):
        check_arguments(open_checkpoint(tmp_path), ["pixel_values"])


def test_a_model_of_numbers_is_refused(tmp_path: Path) -> None:
    tiny_model("autoformer", model_types()["autoformer"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"reads past_values and .*, which no row of text"):
        open_checkpoint(tmp_path)


def test_a_head_that_decodes_text_for_a_base_that_reads_sound_is_its_own_base(tmp_path: Path) -> None:
    """SpeechT5's base model takes spectrograms for its decoder, and its head for text takes token ids."""
    model = tiny_model("speecht5", model_types()["speecht5"])
    save(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.prefix == "" and all(ffn.block.startswith("speecht5.") for ffn in checkpoint.ffns)
