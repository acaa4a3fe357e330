"""Branches of hub models: resolved to a commit when a batch begins, the same for all models and attempts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ffsplit.models.fetch import hub_commit
from ffsplit.zoo.comparison import what_changed
from tests.conftest import CheckpointFactory
from tests.hub_server import COMMIT, Hub, serving
from tests.zoo.test_page import model

RESOLVE = """
import json, sys
from ffsplit.zoo.revisions import at_commits
from ffsplit.zoo.zoo_file import load_zoo
said = []
zoo, commits = at_commits(load_zoo(sys.argv[1]), said.append)
print(json.dumps({"revisions": [each.job.revision for each in zoo.models], "commits": commits, "said": said}))
"""
NEWER = "f" * 40


@pytest.mark.subprocess
def test_a_branch_is_resolved_once_when_a_batch_begins(
    checkpoint_of: CheckpointFactory, tmp_path: Path
) -> None:
    local = checkpoint_of("bert")
    hub = Hub(tmp_path / "hub")
    shutil.copytree(local, hub.add("org/name"), dirs_exist_ok=True)
    models = [
        {"name": "a", "model": "org/name", "revision": "main"},
        {"name": "b", "model": "org/name", "revision": "main", "keep": 0.25},
        {"name": "c", "model": "org/name", "revision": NEWER},
        {"name": "d", "model": str(local)},
        {"name": "e", "model": "org/missing"},
        {"name": "f", "model": "s3://bucket/model"},
    ]
    file = tmp_path / "zoo.yaml"
    file.write_text(json.dumps({"destination": str(tmp_path / "out"), "models": models}))

    def resolved(**environment: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, str(file)],
            env=hub.environment(tmp_path / "home") | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    with serving(hub):
        first = resolved()
        assert first["revisions"] == [COMMIT, COMMIT, NEWER, None, None, None]
        assert first["commits"] == {"0": COMMIT, "1": COMMIT, "2": NEWER}
        (said,) = first["said"]  # type: ignore[misc]
        assert said.startswith("e | its revision could not be looked up: model org/missing: the hub gave no")
        asked = [request for request in hub.requests if "/org/name" in request]
        assert len(asked) == 1
        hub.repositories["org/name"].sha = NEWER
        assert resolved()["revisions"] == [NEWER, NEWER, NEWER, None, None, None]
        assert resolved(HF_HUB_OFFLINE="1")["revisions"] == ["main", "main", NEWER, None, None, None]


def test_what_is_not_on_the_hub_has_no_commit(tmp_path: Path) -> None:
    for place in (str(tmp_path), "s3://bucket/model", "./none", "/none"):
        assert hub_commit(place, revision=None) is None
    assert hub_commit("org/name", revision=COMMIT) == COMMIT


def test_what_changed_between_two_batches() -> None:
    result = model("new", "published").result
    assert result is not None
    inputs = {"model": "1", "recipe": "1", "calibration data": "1", "budget": "1"}
    before = result.model_copy(update={"run_key": "a" * 16, "commit": COMMIT, "inputs": inputs})
    assert what_changed(before, before) == ()
    moved = {"run_key": "b" * 16, "commit": NEWER, "inputs": inputs | {"model": "2", "recipe": "2"}}
    after = before.model_copy(update=moved)
    assert what_changed(before, after) == ("new revision ffffffff (before: 01234567)", "new recipe")
    local = after.model_copy(update={"commit": None})
    assert what_changed(before, local) == ("new model", "new recipe")
    assert what_changed(before, before.model_copy(update={"run_key": "b" * 16})) == (
        "new version of FFSplit",
    )
