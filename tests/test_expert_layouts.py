"""Mixtures of every layout, whole: keeping all changes no bit, keeping half drops neurons and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families.checks import check
from benchmarks.families.tiny import model_types

PLAIN = {
    "llama4_text": True,
    "dbrx": True,
    "jetmoe": True,
    "muse_spark_text": True,
    "inkling_text": True,
    "inkling_mm_model": True,
    "step3p7": True,
    "switch_transformers": True,
    "nllb-moe": True,
    "deepseek_v3": True,
    "ernie4_5_vl_moe": False,
    "internlm3": True,
}
"""Whether half of a type loads with transformers alone."""


@pytest.mark.matrix()
@pytest.mark.parametrize("model_type", PLAIN)
def test_a_mixture_is_compressed_rightly(model_type: str, tmp_path: Path) -> None:
    record = check(model_type, model_types()[model_type], tmp_path, quick=False)
    assert record["outcome"] in ("right", "right in part"), record
    assert record["keep 1: difference"] == 0
    assert record["keep 0.5: plain"] == PLAIN[model_type]
