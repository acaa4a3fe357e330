"""What is fetched from the hub: what a local folder would give, and no gigabyte of other formats.

A server in this process stands for the hub; the client is the real one, in a process that may use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ffsplit.models.checkpoint import open_checkpoint
from tests.conftest import CheckpointFactory

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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


class Hub:
    """A hub with one repository, org/name, and the files that were asked of it."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.fetched: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/org/name/tree/"):
                    self._json([_entry(each, hub.repository) for each in hub.files])
                elif path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
                    siblings = [{"rfilename": name} for name in hub.files]
                    self._json({"id": "org/name", "sha": COMMIT, "siblings": siblings})
                else:
                    self._file(path)

            do_HEAD = do_GET

            def _json(self, value: object) -> None:
                self._answer(json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _file(self, path: str) -> None:
                name = path.removeprefix("/org/name/resolve/").partition("/")[2].replace("%20", " ")
                if name not in hub.files:
                    self._answer(b"", {"X-Error-Code": "RepoNotFound"}, status=404)
                    return
                data = (hub.repository / name).read_bytes()
                if self.command == "GET":
                    hub.fetched.add(name)
                etag = hashlib.sha1(data).hexdigest()
                self._answer(data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

            def _answer(self, data: bytes, headers: dict[str, str], *, status: int = 200) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def files(self) -> list[str]:
        paths = (path for path in self.repository.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.repository).as_posix() for path in paths)


def _entry(name: str, repository: Path) -> dict[str, object]:
    data = (repository / name).read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture
def hub(checkpoint_of: CheckpointFactory, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(Path(shutil.copytree(checkpoint_of("bert"), tmp_path / "repository")))
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def locate(hub: Hub, home: Path, *, model: str = "org/name", offline: bool = False) -> dict[str, Any]:
    settings = {"HF_ENDPOINT": hub.uri, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, model], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.subprocess
def test_the_hub_gives_what_a_local_folder_would(hub: Hub, tmp_path: Path) -> None:
    left_out = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", ".gitattributes"]
    kept = ["2_Dense/config.json", "additional_chat_templates/tool_use.jinja", "odd name.vocab", "code.py"]
    for name in (*left_out, *kept, "README.md"):
        (hub.repository / name).parent.mkdir(exist_ok=True)
        (hub.repository / name).write_text(name)
    here = open_checkpoint(hub.repository)
    expected = {
        "names": sorted({*hub.files} - {*left_out}),
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
        (hub.repository / other).parent.mkdir(exist_ok=True)
        (hub.repository / name).rename(hub.repository / other)
    assert said in locate(hub, tmp_path / "home")["error"]
    assert hub.fetched <= {"config.json", "adapter_config.json"}


@pytest.mark.subprocess
def test_an_id_that_the_hub_does_not_know(hub: Hub, tmp_path: Path) -> None:
    message = locate(hub, tmp_path / "home", model="org/other")["error"]
    assert message.startswith("model org/other: no such directory, and not fetched from the hub (")
