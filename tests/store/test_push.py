"""Uploading to the hub: all of an artifact in one commit, as its manifest lists it, or nothing.

A server in this process stands for the hub; the client is the real one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

import ffsplit
from ffsplit.cli import main
from ffsplit.errors import ArtifactError, RunError, StoreError
from ffsplit.store import push as push_module
from ffsplit.store.push import push
from ffsplit.store.store import open_store
from tests.hub_server import TOKEN, Hub, serving
from tests.small_jobs import SmallJob

from .attempts import ATTEMPT, FILES, RUN_KEY, publish, publish_directory, write_attempt

Captured = pytest.CaptureFixture[str]
OTHER_TOKEN = "hf_" + "x" * 34


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for this process, whose huggingface_hub may be asked anything."""
    hub = Hub(tmp_path / "hub")
    settings = {"ENDPOINT": hub.uri, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("FFSPLIT_CACHE", str(tmp_path / "cache"))
    with serving(hub):
        yield hub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory with one small published artifact."""
    publish(open_store(str(tmp_path / "out")), tmp_path / "attempt")
    return tmp_path / "out"


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat model.safetensors as a file too large to be read at once."""
    monkeypatch.setattr(push_module, "MAX_INLINE_BYTES", 100)


def refused(capsys: Captured, *arguments: str, code: int = 2) -> str:
    """The one line that a command fails with."""
    capsys.readouterr()
    assert main(["push", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_all_files_in_one_private_commit(
    hub: Hub, store_uri: str, tmp_path: Path, capsys: Captured, streamed: None
) -> None:
    publish(open_store(store_uri), tmp_path / "attempt")
    capsys.readouterr()
    assert main(["push", store_uri, "org/name"]) == 0
    assert capsys.readouterr().out == f"{hub.uri}/org/name\n"
    known = hub.repositories["org/name"]
    assert known.private and known.commits == ["m, compressed with FFSplit 0"]
    assert hub.files("org/name") == sorted([*FILES, "manifest.json", ".gitattributes"])
    for name in (*FILES, "manifest.json"):
        assert (hub.folder / "org/name" / name).read_bytes() == (tmp_path / "attempt" / name).read_bytes()


def test_public_where_asked_and_from_python(hub: Hub, out: Path) -> None:
    for uri, repo in (
        (out / "latest", "org/a"),
        (out / RUN_KEY, "org/b"),
        (out / RUN_KEY / ATTEMPT, "org/c"),
    ):
        assert ffsplit.push(str(uri), repo, public=True) == f"{hub.uri}/{repo}"
        assert not hub.repositories[repo].private and len(hub.files(repo)) == 5


def test_a_large_file_in_parts(hub: Hub, out: Path, streamed: None) -> None:
    hub.part_bytes = 3000
    push(str(out), "org/name")
    assert (hub.folder / "org/name/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert len([each for each in hub.requests if each.startswith("PUT /lfs/")]) == 3


def test_a_signature_comes_along(hub: Hub, tmp_path: Path) -> None:
    directory = write_attempt(tmp_path / "attempt")
    (directory / "manifest.json.sig").write_bytes(b"signed")
    publish_directory(open_store(str(tmp_path / "out")), directory)
    push(str(tmp_path / "out"), "org/name")
    assert (hub.folder / "org/name/manifest.json.sig").read_bytes() == b"signed"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_the_manifests_is_not_uploaded(
    hub: Hub, out: Path, name: str, capsys: Captured, streamed: None
) -> None:
    """The small one before anything is created, the large one while it is sent."""
    path = out / RUN_KEY / ATTEMPT / name
    path.write_bytes(bytes(reversed(path.read_bytes())))
    with pytest.raises(ArtifactError, match=f"{name} does not match its manifest's sha256"):
        push(str(out), "org/name")
    assert f"{name} does not match" in refused(capsys, str(out), "org/name", code=1)
    assert all(not known.commits for known in hub.repositories.values())
    assert ("org/name" in hub.repositories) == (name == "model.safetensors")
    path.write_bytes(FILES[name])
    assert push(str(out), "org/name"), "what was left behind is not in the way"
    assert len(hub.repositories["org/name"].commits) == 1


def test_a_manifest_that_was_not_committed_is_not_uploaded(hub: Hub, out: Path, capsys: Captured) -> None:
    path = out / RUN_KEY / ATTEMPT / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"m"', b'"x"'))
    assert "is not the one that was committed" in refused(capsys, str(out), "org/name", code=1)
    assert hub.requests == []


def test_a_name_that_is_taken(hub: Hub, out: Path, capsys: Captured) -> None:
    (hub.add("org/name", private=True) / "config.json").write_text("theirs")
    said = refused(capsys, str(out), "org/name")
    assert "org/name is taken on the hub: choose another name, or delete that repository" in said
    assert hub.repositories["org/name"].commits == []
    assert push(str(out), "org/other")
    assert "org/other is taken on the hub" in refused(capsys, str(out), "org/other")


@pytest.mark.parametrize("public", [False, True])
def test_an_empty_repository_is_used_if_as_many_see_it(
    hub: Hub, out: Path, capsys: Captured, public: bool
) -> None:
    flags = ["--public"] if public else []
    hub.add("org/fits", private=not public)
    hub.add("org/other", private=public)
    said = refused(capsys, str(out), "org/other", *flags)
    assert f"org/other exists and is {'private' if public else 'public'}: make it" in said
    assert main(["push", str(out), "org/fits", *flags]) == 0
    assert len(hub.repositories["org/fits"].commits) == 1


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_token_that_is_refused_is_not_shown(
    hub: Hub, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, debug: list[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    monkeypatch.setenv("FFSPLIT_DEBUG", "")  # which --debug sets, is put back
    assert main(["push", str(out), "org/name", *debug]) == 2
    captured = capsys.readouterr()
    said = captured.err.splitlines()[-1]
    assert f"org/name was not created: {hub.uri} refused the token: set HF_TOKEN" in captured.err
    assert debug or captured.err.count("\n") == 1, said
    assert OTHER_TOKEN[3:] not in captured.out + captured.err
    assert hub.repositories == {}


def test_a_token_in_a_file_is_not_shown(
    hub: Hub, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(OTHER_TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "refused the token" in refused(capsys, str(out), "org/name")
    (tmp_path / "token").write_text(TOKEN)
    assert push(str(out), "org/name")


def test_without_a_token(hub: Hub, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    said = refused(capsys, str(out), "org/name")
    assert "the hub needs a token with write access: set HF_TOKEN, or run `hf auth login`" in said
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_secret\nX-Other: 1", "hf_two words", "hf_caf\u00e9secret"])
def test_a_malformed_token(
    hub: Hub, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    said = refused(capsys, str(out), "org/name")
    assert "secret" not in said and "words" not in said and hub.repositories == {}


def test_a_place_that_is_not_ones_own(hub: Hub, out: Path, capsys: Captured) -> None:
    said = refused(capsys, str(out), "other/name")
    assert "other/name was not created: the token may not write there (" in said
    assert "rights to create a model under other" in said


@pytest.mark.parametrize(
    "repo",
    [
        "name",
        "org/name/more",
        "org/na me",
        "org/",
        "/name",
        "org/na--me",
        ".o/name",
        "org/name.git",
        "hf://o/n",
        "org/" + "n" * 100,
        "",
        "org/na\nme",
        "s3://bucket/name",
    ],
)
def test_names_that_cannot_be(hub: Hub, out: Path, capsys: Captured, repo: str) -> None:
    assert "is no name of a repository: write org/name" in refused(capsys, str(out), repo)
    assert hub.requests == []


def test_what_is_not_committed_or_no_model(hub: Hub, out: Path, tmp_path: Path, capsys: Captured) -> None:
    write_attempt(out / RUN_KEY / ("1" * 12), attempt="1" * 12)
    said = refused(capsys, f"{out}/{RUN_KEY}/{'1' * 12}", "org/name")
    assert "is not committed: only a committed run can be pushed" in said
    publish(open_store(str(out)), tmp_path / "statistics", run_key="f" * 16, kind="statistics")
    said = refused(capsys, f"{out}/{'f' * 16}", "org/name")
    assert "holds statistics, not a model: give the URI of a model" in said
    assert "holds no artifact" in refused(capsys, str(tmp_path / "nowhere"), "org/name")
    assert hub.requests == []


def test_a_hub_that_may_not_be_asked(
    hub: Hub, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it" in refused(capsys, str(out), "org/n")


def test_a_push_that_failed_is_made_up_for(hub: Hub, out: Path, capsys: Captured) -> None:
    hub.failing = {"/commit/": 500}
    said = refused(capsys, str(out), "org/name", code=1)
    assert f"org/name was not uploaded: {hub.uri} answered 500: as the test wants" in said
    assert hub.files("org/name") == [".gitattributes"], "nothing is visible"
    hub.failing = {}
    assert main(["push", str(out), "org/name"]) == 0
    assert len(hub.repositories["org/name"].commits) == 1


def test_a_repository_that_changes_meanwhile(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pushes to one new name: the second to commit sees that it is not the first."""
    claim = push_module._claim

    def late(*arguments: object, **options: object) -> str | None:
        parent = claim(*arguments, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(push_module, "_claim", claim)
        push(str(out), "org/name")
        return parent

    monkeypatch.setattr(push_module, "_claim", late)
    with pytest.raises(StoreError, match="the repository was changed meanwhile"):
        push(str(out), "org/name")
    assert len(hub.repositories["org/name"].commits) == 1


def test_access_that_ends_while_it_is_used_is_no_mistake(hub: Hub, out: Path) -> None:
    """Exit code 1: the command was right, and something has been written."""
    hub.failing = {"/preupload/": 403}
    with pytest.raises(RunError, match="org/name was not uploaded: the token may not write there"):
        push(str(out), "org/name")


def test_a_card_that_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    files = FILES | {"README.md": b"---\nlicense: [\n---\n"}
    publish_directory(open_store(str(tmp_path / "out")), write_attempt(tmp_path / "attempt", files=files))
    with pytest.raises(
        StoreError, match=r"org/name was not uploaded: .* Invalid metadata in README.md. - bad"
    ):
        push(str(tmp_path / "out"), "org/name")
    assert hub.repositories["org/name"].commits == []


def test_a_hub_that_is_away(hub: Hub, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refused(capsys, str(out), "org/name", code=1)
    assert "org/name was not created: http://127.0.0.1:9: " in said


DOWNLOAD = """
import sys, ffsplit
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModel
snapshot_download("org/small", local_dir=sys.argv[1])
assert AutoModel.from_pretrained("org/small").config.model_type == "bert"
found = ModelCard.load("org/small").data
print(found.base_model, found.library_name, found.license, found.tags)
"""


@pytest.mark.subprocess
def test_from_the_hub_and_back(small_job: SmallJob, tmp_path: Path) -> None:
    """What others download is the artifact, byte by byte; transformers loads it, and its card is read."""
    hub = Hub(tmp_path / "hub")
    shutil.copytree(small_job.model, hub.add("org/original"), dirs_exist_ok=True)
    (hub.folder / "org/original/README.md").write_text("---\nlicense: mit\n---\n")
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}

    def done(*command: str) -> str:
        ran = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0 and TOKEN not in ran.stdout + ran.stderr, ran.stderr
        return ran.stdout

    with serving(hub):
        arguments = ["org/original", *small_job.arguments(tmp_path / "out", "--runner", "serial")[1:]]
        done("-m", "ffsplit.cli", "compress", *arguments)
        printed = done("-m", "ffsplit.cli", "push", str(tmp_path / "out" / "latest"), "org/small")
        assert printed == f"{hub.uri}/org/small\n"
        card = done("-c", DOWNLOAD, str(tmp_path / "copy"))
    assert card == "org/original transformers mit ['ffsplit', 'compressed']\n"
    assert hub.repositories["org/small"].private and len(hub.repositories["org/small"].commits) == 1
    assert ffsplit.verify(str(tmp_path / "copy")).ok
    front = (tmp_path / "copy" / "README.md").read_text().split("---\n")[1]
    assert "base_model: org/original\nbase_model_relation: finetune\n" in front
