"""A process that never imports ffsplit loads plain artifacts as they are, and fails on all others."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from ffsplit.models.load import load_whole_model
from tests.runtime.conftest import CompressedFactory
from tests.tiny_models import FAMILIES

LOADS = """
import json, sys
import torch, transformers

IDS, MASK, jobs = json.load(open(sys.argv[1]))
answers = []
for class_name, directory in jobs:
    try:
        model = getattr(transformers, class_name).from_pretrained(directory).eval()
    except Exception as error:
        answers.append({"error": f"{type(error).__name__}: {error}"})
    else:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits
        answers.append({"logits": logits.tolist()})
assert "ffsplit" not in sys.modules
json.dump(answers, open(sys.argv[2], "w"))
"""
IDS = [[5, 50, 150, 199, 30, 77], [8, 9, 10, 0, 0, 0]]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
PLAIN = [(family, recipe) for family in FAMILIES for recipe in ("fast", "norm-prune")]
SPLIT = [(family, recipe) for family in FAMILIES for recipe in ("svd", "paper", "whitened-svd")]
SPLIT += [(family, "flap") for family in ("mistral", "qwen2")]  # a bias where the family has none
UNEVEN = ("bert", "opt", "llama")


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    compressed_of: CompressedFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Any, Any]:
    """What each load gave that a test of this session asks for, all of them in one process."""
    asked = {
        (item.callspec.params["family"], item.callspec.params["recipe"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    }
    made = {key: compressed_of(key[0], recipe=key[1]) for key in PLAIN + SPLIT if key in asked}
    made |= {
        (name, "uneven"): compressed_of(name, recipe="fast", keep=(0.5, 0.25, 1.0))
        for name in UNEVEN
        if (name, "uneven") in asked
    }
    jobs = {key: [each.source.class_name, str(each.directory)] for key, each in made.items()}
    folder = tmp_path_factory.mktemp("without")
    for family in ("bert", "llama"):
        compressed = compressed_of(family, recipe="paper")
        class_name = compressed.source.class_name
        load_whole_model(compressed.directory, class_name).save_pretrained(folder / family)
        jobs[family, "saved again"] = [class_name, str(folder / family)]
        jobs[family, "base"] = ["AutoModel", str(compressed.directory)]
    (folder / "jobs.json").write_text(json.dumps([IDS, MASK, list(jobs.values())]))
    (folder / "loads.py").write_text(LOADS)
    done = subprocess.run(
        [sys.executable, folder / "loads.py", folder / "jobs.json", folder / "answers.json"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, json.loads((folder / "answers.json").read_text()), strict=True))


@pytest.mark.matrix()
@pytest.mark.subprocess
@pytest.mark.parametrize(("family", "recipe"), PLAIN)
def test_plain_artifacts_load_with_equal_logits(
    compressed_of: CompressedFactory, answers: dict[Any, Any], family: str, recipe: str
) -> None:
    compressed = compressed_of(family, recipe=recipe)
    model = load_whole_model(compressed.directory, compressed.source.class_name)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits
    torch.testing.assert_close(
        torch.tensor(answers[family, recipe]["logits"]), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.matrix()
@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("family", "recipe"),
    SPLIT
    + [(family, "uneven") for family in UNEVEN]
    + [(family, how) for family in ("bert", "llama") for how in ("saved again", "base")],
)
def test_no_other_artifact_loads_silently(answers: dict[Any, Any], family: str, recipe: str) -> None:
    assert "ignore_mismatched_sizes" in answers[family, recipe].get("error", "it was loaded")
