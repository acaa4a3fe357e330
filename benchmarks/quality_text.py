"""What a language model is scored on: texts of several domains, and what it writes itself."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from ffsplit.calibration.model_inputs import padded_batches
from ffsplit.calibration.sources import read_all
from ffsplit.measurement.fidelity import token_fidelity
from ffsplit.measurement.tasks.language_model import tokenize_text

DOMAINS = {
    "prose": "running English text, held out from the text that all recipes read",
    "sentences": "single sentences, one a line: captions, headlines and forum posts (STS-B dev)",
    "documentation": "Python's documentation, `pydoc_data.topics`",
    "source": "Python's standard library, the middles of 48 modules",
}
WINDOW_TOKENS = 1024
PROMPT_TOKENS = 32
WRITTEN_TOKENS = 96
GRAM = 4
NUM_MODULES, MODULE_CHARACTERS = 48, 8000
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}


class TextScore(NamedTuple):
    """One domain's figures. `kl` is KL(original | compressed) in nats per token."""

    original: float
    perplexity: float
    kl: float
    agreement: float
    num_tokens: int


def domain_texts(data: Path) -> dict[str, str]:
    """The texts by domain. Those that come from `data` are left out where their files are missing."""
    texts = {}
    if (data / "corpus/heldout.txt").is_file():
        texts["prose"] = (data / "corpus/heldout.txt").read_text("utf-8")
    if (data / "stsb/dev.csv").is_file():
        sentences = read_all([f"{data}/stsb/dev.csv#{side}" for side in (0, 1)])
        texts["sentences"] = "\n".join(dict.fromkeys(sentences))
    texts["documentation"] = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = sorted(random.Random(0).sample(modules, min(NUM_MODULES, len(modules))))
    sources = (each.read_text("utf-8", errors="ignore") for each in chosen)
    texts["source"] = "\n\n".join(_middle(each, MODULE_CHARACTERS) for each in sources)
    return texts


def _middle(text: str, size: int) -> str:
    start = max(0, (len(text) - size) // 2)
    return text[start : start + size]


def cut_windows(tokens: Sequence[int], *, length: int, most: int) -> list[list[int]]:
    """At most `most` windows of `length` tokens, evenly spaced over a text. A shorter text is one window."""
    windows = [list(tokens[at : at + length]) for at in range(0, len(tokens) - length + 1, length)]
    windows = windows or [list(tokens)]
    count = min(most, len(windows))
    return [windows[index * len(windows) // count] for index in range(count)]


class Scored(NamedTuple):
    """What one language model is scored on, as tokens."""

    windows: dict[str, list[list[int]]]
    prompts: list[list[int]]


def read_scored(
    data: Path, tokenizer: Any, *, longest: int | None, num_windows: int, num_prompts: int
) -> Scored:
    """Windows of every domain, and prompts, equally many from each. `longest` is the model's longest row."""
    length = min(WINDOW_TOKENS, longest or WINDOW_TOKENS)
    texts = {name: tokenize_text(tokenizer, text) for name, text in domain_texts(data).items()}
    windows = {name: cut_windows(ids, length=length, most=num_windows) for name, ids in texts.items()}
    prompts: list[list[int]] = []
    for index, ids in enumerate(texts.values(), start=1):
        share = num_prompts * index // len(texts) - len(prompts)
        prompts += cut_windows(ids, length=PROMPT_TOKENS, most=share)
    return Scored(windows, prompts)


def score_domains(
    original: Any, compressed: Any, windows: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, TextScore]:
    """Both models' perplexities and the KL divergence between them, on every domain."""
    device = torch.device(original.device)
    scores = {}
    for name, rows in windows.items():
        padded = padded_batches(rows, batch_tokens=BATCH_TOKENS[device.type], pad_id=0)
        found = token_fidelity(original, compressed, (batch.to(device) for batch in padded))
        scores[name] = TextScore(
            original=found["original_perplexity"],
            perplexity=found["compressed_perplexity"],
            kl=found["kl_divergence"],
            agreement=found["top1_agreement"],
            num_tokens=sum(len(row) - 1 for row in rows),
        )
    return scores


def repeated_grams(tokens: Sequence[int]) -> float:
    """The share of 4-grams that were there before: 0 if all differ, near 1 for a loop."""
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def repetition(model: Any, prompts: Sequence[Sequence[int]], *, num_tokens: int = WRITTEN_TOKENS) -> float:
    """The mean of `repeated_grams` over greedy continuations of `num_tokens` tokens, none ended earlier."""
    config = GenerationConfig(
        do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0
    )
    ids = torch.tensor(prompts, device=model.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    shares = [repeated_grams(row) for row in written[:, ids.shape[1] :].tolist()]
    return sum(shares) / len(shares)
