"""What a row says of a model: the part of the config that its towers are made from, and what they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ffsplit.measurement.latency import vocab_size_of
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.detection import row_by_structure
from ffsplit.models.names import main_inputs
from tests.tiny_models import VOCAB_SIZE, randomize

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
_TEXT = _SIZES | {"vocab_size": VOCAB_SIZE, "num_key_value_heads": 1, "head_dim": 8}
_PICTURES = _SIZES | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
_PALI = {"text_config": _TEXT, "vision_config": _PICTURES, "image_token_index": 60, "projection_dim": 16}


def on_meta(class_name: str, **config: Any) -> Any:
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        return cls(cls.config_class(**config))


def test_the_base_models_config_may_be_a_part() -> None:
    pali = {"model_type": "paligemma", **_PALI}
    model = on_meta("ColPaliForRetrieval", vlm_config=pali, embedding_dim=8)
    row = row_by_structure(model, config=model.config.to_dict())
    assert [tower.config for tower in row.towers] == ["vlm_config.vision_config", "vlm_config.text_config"]
    assert vocab_size_of(model) == model.config.vlm_config.text_config.vocab_size


def test_a_family_may_use_the_class_of_another(tmp_path: Path) -> None:
    """Files of PP-Chart2Table name GOT-OCR2's class; transformers has none of its own."""
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    vision |= {"patch_size": 8, "output_channels": 8, "mlp_dim": 40, "window_size": 2}
    cls = transformers.GotOcr2ForConditionalGeneration
    config = cls.config_class(text_config=_TEXT | {"model_type": "qwen2"}, vision_config=vision)
    model = cls(config)
    randomize(model, seed=0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "pp_chart2table"}))
    checkpoint = open_checkpoint(tmp_path)
    assert [ffn.shape.num_neurons for ffn in checkpoint.ffns] == [40, 40]


def test_text_to_sound_is_no_language_model() -> None:
    """Its logits are of codes of sounds: no text could tell how good they are."""
    codes = {"vocab_size": 16, "num_codebooks": 2}
    depth = _TEXT | codes | {"backbone_hidden_size": 16, "max_position_embeddings": 4}
    model = on_meta("CsmForConditionalGeneration", **_TEXT | codes, depth_decoder_config=depth)
    assert row_by_structure(model, config=model.config.to_dict()).makes == "states"


class Seeing(nn.Module):
    """A model of pictures that does not say so."""

    main_input_name = "input_ids"

    def forward(self, pixel_values: Any, **_: Any) -> Any:
        return pixel_values


def test_the_arguments_tell_what_a_model_reads() -> None:
    assert main_inputs(Seeing()) == ("pixel_values",)
    assert main_inputs(on_meta("MgpstrModel", hidden_size=16, num_hidden_layers=1)) == ("pixel_values",)
