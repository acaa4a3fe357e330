"""The survey's checks on one model type of each shape. `make bench-families` has all types.

Keeping all neurons changes no bit of the outputs. Keeping half gives the dense model without the other
neurons, counts every FFN, and loads with transformers alone where that is expected. `make test` runs the
first type of each shape.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.families.checks import check
from benchmarks.families.tiny import model_types

PLAIN, NOT = True, False
SHAPES: dict[str, dict[str, bool]] = {
    "two maps spread over a block": {"bert": PLAIN, "layoutlmv3": PLAIN, "opt": PLAIN},
    "two maps in a module": {"mpt": NOT, "bloom": NOT, "nomic_bert": PLAIN},
    "transposed maps": {"gpt2/inner": PLAIN},
    "three maps": {"llama/biases": PLAIN, "lfm2": NOT},
    "gate and up in one map": {"phi3": PLAIN, "modernbert": PLAIN},
    "several FFNs in a block": {"mobilebert": PLAIN},
    "an activation of its own": {"esm": PLAIN},
    "a trained activation": {"apertus": PLAIN},
    "a scale after the FFN": {"rwkv": PLAIN},
    "a convolution between the maps": {"segformer": NOT},
    "a batch norm between the maps": {"levit": NOT},
    "shared blocks": {"albert": PLAIN},
    "nested lists of blocks": {"swin": NOT, "funnel": PLAIN},
    "blocks without an FFN": {"jamba": PLAIN, "nemotron_h": PLAIN, "granitemoehybrid": PLAIN},
    "blocks of two mixers": {"falcon_h1": PLAIN},
    "FFNs that blocks share": {"zamba": PLAIN, "zamba2": PLAIN},
    "encoder and decoder": {"mbart": PLAIN, "led": PLAIN, "prophetnet": PLAIN, "t5/gated": PLAIN},
    "sound to text": {"whisper": PLAIN, "speecht5": PLAIN},
    "sound": {"wav2vec2-bert": PLAIN},
    "pictures beside texts": {"clip": PLAIN, "siglip2": NOT},
    "pictures in a text": {"llava": PLAIN, "paligemma": PLAIN, "qwen2_5_vl": PLAIN, "gemma3": NOT},
    "texts of pictures": {"blip": PLAIN, "florence2": NOT},
    "experts in a stack": {"gpt_oss": PLAIN, "mixtral": PLAIN},
    "experts in a transposed stack": {"llama4_text": PLAIN},
    "experts below each other": {"dbrx": PLAIN},
    "experts behind their own router": {"jetmoe": PLAIN},
    "experts in modules": {"switch_transformers": PLAIN, "nllb-moe": PLAIN},
    "experts that clamp": {"step3p7/clamped": PLAIN, "step3p7": PLAIN},
    "experts that normalize": {"muse_spark_text": PLAIN},
    "experts with soft caps": {"inkling2_text": PLAIN, "inkling_text": PLAIN, "inkling_mm_model": PLAIN},
    "a shared expert": {"qwen3_next": PLAIN, "glm4_moe": PLAIN},
    "a shared expert of twice the width": {"deepseek_v2": PLAIN, "deepseek_v3": PLAIN, "deepseek_v4": PLAIN},
    "experts for pictures": {"ernie4_5_vl_moe": NOT},
    "modelling code of another family": {"internlm3": PLAIN},
}
IN_PART = ("step3p7/clamped", "step3p7", "ernie4_5_vl_moe")
"""Calibrated on text, since their processors need libraries that are not here: their vision towers stay."""
REFUSED = {
    "convnext": "no FFN of two or three linear layers",
    "mamba2": "no FFN of two or three linear layers",
    "bitnet": r"has a norm over its FFNs' neurons .* quantize it with another tool",
    "longcat_flash": "in a form that FFSplit does not know: .*experts.gate_up_proj",
}


CASES = [
    pytest.param(model_type, is_plain, id=f"{shape}: {model_type}", marks=[pytest.mark.slow] * (position > 0))
    for shape, types in SHAPES.items()
    for position, (model_type, is_plain) in enumerate(types.items())
]


@pytest.mark.parametrize(("model_type", "is_plain"), CASES)
def test_a_type_of_this_shape_is_compressed_rightly(model_type: str, is_plain: bool, tmp_path: Path) -> None:
    record = check(model_type, model_types()[model_type], tmp_path, quick=False)
    assert record["outcome"] == ("right in part" if model_type in IN_PART else "right"), record
    assert record["keep 1: difference"] == 0
    assert record["keep 0.5: plain"] == is_plain


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_of_no_known_shape_is_refused(model_type: str, tmp_path: Path) -> None:
    record = check(model_type, model_types()[model_type], tmp_path, quick=False)
    assert record["outcome"] in ("refused", "no FFN, refused"), record
    assert re.search(REFUSED[model_type], record["why"])
