"""Fidelity block by block is that of whole models, and says where they come apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.measurement.fidelity import fidelity, streamed_fidelity
from ffsplit.models.load import load_whole_model
from ffsplit.models.streamed import StreamedModel
from ffsplit.models.tensor_files import read_headers
from tests.runtime.conftest import CompressedFactory, compressed_of
from tests.tiny_models import ENCODERS, random_rows

__all__ = ["compressed_of"]

BATCHES = list(padded_batches(random_rows(9), batch_tokens=60, pad_id=0))


@pytest.mark.matrix()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["paper", "fast"])
@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
@torch.no_grad()
def test_scores_are_those_of_whole_models(
    compressed_of: CompressedFactory, family: str, recipe: str, dtype: torch.dtype
) -> None:
    made = compressed_of(family, recipe=recipe)
    source, makes = made.source, "encoder" if family in ENCODERS else "causal_lm"
    directories = (source.directory, made.directory)
    whole = [load_whole_model(each, source.class_name, dtype=dtype) for each in directories]
    after = replace(source, directory=made.directory, tensors=read_headers(made.directory))
    original, compressed = (
        StreamedModel(each, device=torch.device("cpu"), dtype=dtype, class_name=source.class_name)
        for each in (source, after)
    )
    scores, blocks = streamed_fidelity(original, compressed, BATCHES, makes=makes)
    assert scores == fidelity(*whole, BATCHES, makes=makes)
    assert [block.layer for block in blocks] == [0, 1, 2]
    assert all(0 < block.relative_error < 2 and block.cosine < 1 for block in blocks)

    expected = [model(**BATCHES[0].arguments, output_hidden_states=True).hidden_states[1] for model in whole]
    is_token = BATCHES[0].attention_mask.bool()
    a_TD, b_TD = (states[is_token].float() for states in expected)
    _, first = streamed_fidelity(original, compressed, BATCHES[:1], makes=makes)
    assert first[0].relative_error == pytest.approx(float((b_TD - a_TD).norm() / a_TD.norm()), rel=1e-5)


def test_a_model_is_like_itself(compressed_of: CompressedFactory) -> None:
    source = compressed_of("bert", recipe="fast").source
    same = [StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32) for _ in range(2)]
    scores, blocks = streamed_fidelity(*same, BATCHES, makes="states")
    assert scores["token_cosine"] == pytest.approx(1, abs=1e-6)
    assert all(block.relative_error == 0 for block in blocks)
