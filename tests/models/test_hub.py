"""What is fetched from the hub: what a local folder would give, and no gigabyte of other formats.

A server in this process stands for the hub; the client is the real one, in a process that may use it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ffsplit.models.checkpoint import open_checkpoint
from tests.conftest import CheckpointFactory
from tests.hub_server import COMMIT, Hub, serving

LOCATE = """
import json, sys
from pathlib import Path
from ffsplit.errors import FFSplitError
from ffsplit.models.checkpoint import open_checkpoint
from ffsplit.models.fetch import locate_model
try:
    found = locate_model(sys.argv[1])
    names = [path.relative_to(found.directory).as_posix() for path in found.directory.rglob("*")
             if path.is_file()]
    print(json.dumps({"names": sorted(names), "revision": found.revision,
                      "left_out": [each.path for each in found.left_out],
                      "digest": open_checkpoint(found.directory).tokenizer_digest()}))
except FFSplitError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one repository, org/name."""
    hub = Hub(tmp_path / "hub")
    shutil.copytree(checkpoint_of("bert"), hub.add("org/name"), dirs_exist_ok=True)
    with serving(hub):
        yield hub


def repository(hub: Hub) -> Path:
    return hub.folder / "org/name"


def locate(hub: Hub, home: Path, *, model: str = "org/name", offline: bool = False) -> dict[str, Any]:
    environment = hub.environment(home) | {"HF_HUB_OFFLINE": "1" if offline else "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, model], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.subprocess
def test_the_hub_gives_what_a_local_folder_would(hub: Hub, tmp_path: Path) -> None:
    left_out = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", ".gitattributes"]
    kept = ["2_Dense/config.json", "additional_chat_templates/tool_use.jinja", "odd name.vocab", "code.py"]
    for name in (*left_out, *kept, "README.md"):
        (repository(hub) / name).parent.mkdir(exist_ok=True)
        (repository(hub) / name).write_text(name)
    here = open_checkpoint(repository(hub))
    expected = {
        "names": sorted({*hub.files("org/name")} - {*left_out}),
        "revision": COMMIT,
        "left_out": [each.path for each in here.folder.files.left_out],
        "digest": here.tokenizer_digest(),
    }
    assert expected["left_out"] == [".gitattributes", "onnx/", "pytorch_model.bin", "tf_model.h5"]
    assert locate(hub, tmp_path / "home") == expected
    assert not hub.fetched & {*left_out}
    assert locate(hub, tmp_path / "home", offline=True) == expected


@pytest.mark.matrix(said=("org/name is an adapter",))
@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.safetensors": "pytorch_model.bin"}, "org/name holds only pickled weights"),
        ({"model.safetensors": "model.gguf"}, "org/name holds its weights only as model.gguf"),
        ({"config.json": "adapter_config.json"}, "org/name is an adapter"),
        ({"config.json": "0_Transformer/config.json"}, "these folders below it do: org/name/0_Transformer"),
    ],
)
def test_what_is_no_model_is_told_before_it_is_fetched(
    hub: Hub, tmp_path: Path, change: dict[str, str], said: str
) -> None:
    for name, other in change.items():
        (repository(hub) / other).parent.mkdir(exist_ok=True)
        (repository(hub) / name).rename(repository(hub) / other)
    assert said in locate(hub, tmp_path / "home")["error"]
    assert hub.fetched <= {"config.json", "adapter_config.json"}


@pytest.mark.subprocess
def test_an_id_that_the_hub_does_not_know(hub: Hub, tmp_path: Path) -> None:
    message = locate(hub, tmp_path / "home", model="org/other")["error"]
    assert message.startswith("model org/other: no such directory, and not fetched from the hub (")
