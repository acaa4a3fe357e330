"""Task scores equal their definition, computed one sentence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from ffsplit.errors import ConfigError
from ffsplit.measurement.tasks import SentencePair, read_sentence_pairs, sentence_embeddings, sts_score
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.load import load_base_model, load_tokenizer
from tests.conftest import CheckpointFactory

SENTENCES = [
    "the people",
    "such a long way down, and back through all of it",
    "new years",
    "at home",
    "1 2 3",
]


@torch.no_grad()
def test_embeddings_are_unit_means_in_the_order_of_the_sentences(checkpoint_of: CheckpointFactory) -> None:
    directory = checkpoint_of("bert")
    model = load_base_model(directory, device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_tokenizer(open_checkpoint(directory))
    found = sentence_embeddings(model, tokenizer, SENTENCES, max_length=32)
    for sentence, embedding_D in zip(SENTENCES, found, strict=True):
        mean_D = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding_D, mean_D / mean_D.norm(), rtol=1e-4, atol=1e-5)
    scores = [3.0, 1.0, 2.0, 5.0]
    pairs = [SentencePair(*SENTENCES[index : index + 2], score) for index, score in enumerate(scores)]
    cosines = [float(found[index] @ found[index + 1]) for index in range(4)]
    expected = 100 * float(spearmanr(cosines, scores).statistic)
    assert sts_score(model, tokenizer, pairs) == pytest.approx(expected)


def test_sentence_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('"One, two.",Two.,4.5\nA,B,0\n', "utf-8")
    assert read_sentence_pairs(path) == [SentencePair("One, two.", "Two.", 4.5), SentencePair("A", "B", 0.0)]


@pytest.mark.parametrize("line", ["A,B", "A,B,much", "A,B,1,2"])
def test_a_row_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"A,B,1\n{line}\n")
    with pytest.raises(ConfigError, match=r"pairs\.csv:2: expected two sentences and a score"):
        read_sentence_pairs(path)


def test_the_development_pairs(development_data: Path) -> None:
    pairs = read_sentence_pairs(development_data / "stsb" / "dev.csv")
    assert len(pairs) == 1500 and all(0 <= pair.score <= 5 for pair in pairs)
