"""A small Hugging Face hub on loopback, which the real client reads from and uploads to.

It answers as https://huggingface.co does: creating repositories, the preupload question, the batches of Git
LFS (in one part or several), commits as NDJSON, listings and downloads. Files are kept below a folder, as
`org/name/path`. It has no Xet: set HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".h5", ".onnx")
TOKEN = "hf_" + "w" * 34
"""May write to `org`."""


@dataclass
class Repository:
    """What the hub knows of a repository besides its files."""

    private: bool = False
    sha: str = COMMIT
    commits: list[str] = field(default_factory=list)
    """The summaries, oldest first."""


class Hub:
    """The server, with everything that was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by sha256, visible only once a commit names them."""
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes: int | None = None
        """Larger files are uploaded in parts of this size."""
        self.fetched: set[str] = set()
        self.requests: list[str] = []
        self.failing: dict[str, int] = {}
        """The status of every request whose path has this in it."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.uri = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process whose hub this is."""
        settings = {"HF_ENDPOINT": self.uri, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
        return {**os.environ, **settings}

    def files(self, repo: str) -> list[str]:
        root = self.folder / repo
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def add(self, repo: str, *, private: bool = False) -> Path:
        """A new repository, with what the hub puts into it; returns its folder."""
        self.repositories[repo] = Repository(private=private)
        (self.folder / repo).mkdir(parents=True, exist_ok=True)
        (self.folder / repo / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        return self.folder / repo


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._begin()
        if path is None:
            return
        rest = path.partition("/api/models/")[2]
        if not rest:
            return self._download(path)
        repo = "/".join(rest.split("/")[:2])
        if not self._sees(repo):
            return
        files = self.hub.files(repo)
        if "/tree/" in rest:
            return self._json([self._entry(repo, name) for name in files])
        known, siblings = self.hub.repositories[repo], [{"rfilename": name} for name in files]
        self._json({"id": repo, "sha": known.sha, "private": known.private, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self._begin(), self._body()
        if path is None:
            return
        if path == "/api/validate-yaml":
            bad = b"license: [" in body
            errors = [{"message": "bad YAML"}] if bad else []
            return self._json({"errors": errors, "warnings": []}, status=400 if bad else 200)
        if path.startswith("/lfs/"):  # signed links, which need no token
            return self._complete(path.split("/")[2], json.loads(body))
        if not self._may_write():
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path.startswith("/api/models/") and "/preupload/" in path:
            repo = path.removeprefix("/api/models/").partition("/preupload/")[0]
            self._json({"files": [self._mode(repo, each) for each in json.loads(body)["files"]]})
        elif path.startswith("/api/models/") and "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(repo, [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "no such page")

    def do_PUT(self) -> None:
        path, body = self._begin(), self._body()
        if path is None:
            return
        _, _, oid, part = path.split("/")
        if part == "whole" and hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, "the content is not that of the oid")
        if part == "whole":
            self.hub.objects[oid] = body
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        self._answer(b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _begin(self) -> str | None:
        """The path of a request; None if it was answered, since it is to fail."""
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        for fragment, status in self.hub.failing.items():
            if fragment in path:
                self._body()
                return self._refuse(status, "as the test wants")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._refuse(401, "Invalid username or password.")
        return False

    def _sees(self, repo: str) -> bool:
        known = self.hub.repositories.get(repo)
        if known and (not known.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return True
        self._answer(b"", {"X-Error-Code": "RepoNotFound"}, status=404)
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repositories:
            return self._refuse(409, "You already created this model repo")
        if asked["organization"] != "org":
            return self._refuse(
                403, f"You don't have the rights to create a model under {asked['organization']}"
            )
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(repo, private=private)
        self._json({"url": f"{self.hub.uri}/{repo}", "name": repo, "id": COMMIT[:24]})

    def _mode(self, repo: str, asked: dict[str, Any]) -> dict[str, Any]:
        sample = base64.b64decode(asked["sample"])
        assert len(sample) <= 512 and sample[:512] == sample
        is_large = asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > 10 << 20
        mode = "lfs" if is_large or b"\0" in sample else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _batch(self, asked: dict[str, Any]) -> None:
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        objects = []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            if oid in self.hub.objects:
                objects.append({"oid": oid, "size": size})
                continue
            header: dict[str, str] = {}
            href = f"{self.hub.uri}/lfs/{oid}/whole"
            if self.hub.part_bytes and size > self.hub.part_bytes:
                header = {"chunk_size": str(self.hub.part_bytes)}
                count = -(-size // self.hub.part_bytes)
                header |= {str(part): f"{self.hub.uri}/lfs/{oid}/{part}" for part in range(1, count + 1)}
                href = f"{self.hub.uri}/lfs/{oid}/complete"
            verify = {"href": f"{self.hub.uri}/lfs/{oid}/verify"}
            upload = {"href": href, "header": header}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        self._json({"transfer": "basic", "objects": objects})

    def _complete(self, oid: str, told: dict[str, Any]) -> None:
        """The end of an upload in parts, or the question whether an object has arrived."""
        if "parts" in told:
            parts = self.hub.parts.pop(oid)
            data = b"".join(parts[part] for part in sorted(parts))
            if hashlib.sha256(data).hexdigest() != oid or len(told["parts"]) != len(parts):
                return self._refuse(400, "the parts are not those of the oid")
            self.hub.objects[oid] = data
        elif len(self.hub.objects.get(oid, b"")) != told["size"]:
            return self._refuse(404, "there is no such object")
        self._json({})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        known, (header, *changes) = self.hub.repositories[repo], lines
        if header["value"].get("parentCommit", known.sha) != known.sha:
            return self._refuse(412, "a commit has happened since")
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                data = base64.b64decode(value["content"])
            elif value["oid"] in self.hub.objects:
                data = self.hub.objects[value["oid"]]
            else:
                return self._refuse(400, f"{value['path']} was not uploaded")
            path = self.hub.folder / repo / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        known.commits.append(header["value"]["summary"])
        known.sha = hashlib.sha1(known.sha.encode()).hexdigest()
        url = f"{self.hub.uri}/{repo}/commit/{known.sha}"
        self._json({"success": True, "commitOid": known.sha, "commitUrl": url})

    def _entry(self, repo: str, name: str) -> dict[str, object]:
        data = (self.hub.folder / repo / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _download(self, path: str) -> None:
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if not self._sees(repo):
            return
        if name not in self.hub.files(repo):
            return self._answer(b"", {"X-Error-Code": "EntryNotFound"}, status=404)
        data = (self.hub.folder / repo / name).read_bytes()
        if self.command == "GET":
            self.hub.fetched.add(name)
        etag = hashlib.sha1(data).hexdigest()
        self._answer(data, {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.repositories[repo].sha})

    def _refuse(self, status: int, message: str) -> None:
        self._json({"error": message}, status=status)

    def _json(self, value: object, *, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), {"Content-Type": "application/json"}, status=status)

    def _answer(self, data: bytes, headers: dict[str, str], *, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
