"""Documents name what is local by its name: no path of the machine is published with a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ffsplit
from ffsplit.cli import main
from ffsplit.config import Record
from ffsplit.directories import by_name
from tests.small_jobs import SmallJob


class Example(Record):
    texts: tuple[str, ...]


@pytest.mark.parametrize(
    ("given", "text", "expected"),
    [
        ("/data/my model", "/data/my model", "my model"),
        ("/data/my-model/", "see /data/my-model/config.json", "see my-model/config.json"),
        ("sts:/data/in/pairs.csv#a", "sts:/data/in/pairs.csv#a", "sts:pairs.csv#a"),
        ("/data/r\u00e9sum\u00e9s/x.txt", "/data/r\u00e9sum\u00e9s/x.txt", "x.txt"),
        ('/data/"quoted"/x.txt', '/data/"quoted"/x.txt', "x.txt"),
        ("file:///data/out", "/data/out/run", "out/run"),
        ("/model", "/model and /other/model", "model and /other/model"),
        ("~/models/x", "~/models/x", "x"),
        ("data/x.txt", "data/x.txt", "data/x.txt"),
        ("s3://bucket/data/x", "s3://bucket/data/x", "s3://bucket/data/x"),
        ("org/name", "org/name", "org/name"),
        ("hf:imdb#text@train", "hf:imdb#text@train", "hf:imdb#text@train"),
        (None, "and/or 1/2", "and/or 1/2"),
    ],
)
def test_a_path_becomes_a_name(given: str | None, text: str, expected: str) -> None:
    assert by_name(Example(texts=(text, "1")), given=[given]) == Example(texts=(expected, "1"))


def test_home_and_temporary_files_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    record = Example(texts=(f"{tmp_path}/home/.cache/x failed", f"no {tmp_path}/a/b"))
    assert by_name(record, given=[]) == Example(texts=(".cache/x failed", "no a/b"))


def test_where_every_folder_is_the_root_nothing_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose home and working directory are /."""
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr("tempfile.tempdir", "/")
    monkeypatch.chdir("/")
    assert by_name(Example(texts=("/a/b",)), given=[None]) == Example(texts=("/a/b",))


def test_no_document_of_a_run_has_a_path(small_job: SmallJob, tmp_path: Path) -> None:
    """Manifest, card, report, index, statistics, weights; with lent statistics, tasks and a benchmark."""
    rows = small_job.text.read_text().splitlines()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("".join(f"{row},at home,{index}\n" for index, row in enumerate(rows)))
    out, again = tmp_path / "out", tmp_path / "again"
    manifest = ffsplit.compress(small_job.config(out, eval=(f"sts:{pairs}",), gate=("token_cosine >= 0",)))
    lent = ffsplit.compress(small_job.config(again, keep=0.4, stats=str(out)))
    against = ["--against", str(small_job.model), "--pairs", "1", "--no-memory", "--lengths", "8"]
    assert main(["benchmark", str(out), *against]) == 0
    assert manifest.model.id == small_job.model.name
    assert manifest.calibration.sources == ("text.txt",)
    assert manifest.measurements is not None and manifest.measurements.tasks[0].spec == "sts:pairs.csv"
    assert lent.calibration.statistics_from is not None
    assert lent.calibration.statistics_from.uri == f"out/{manifest.run_key}/{manifest.attempt}"
    names = {str(place).encode() for place in (tmp_path, small_job.model.parent, Path.home(), Path.cwd())}
    files = [path for folder in (out, again) for path in folder.rglob("*") if path.is_file()]
    assert {"manifest.json", "README.md", "report.html", "neurons.parquet"} <= {path.name for path in files}
    assert any("benchmarks" in path.parts for path in files)
    for path in files:
        data = path.read_bytes()
        assert not [name for name in names if name in data], f"{path} holds a path of this machine"
        if path.suffix in (".json", ".md"):
            assert not re.search(rb'"(/|~/)[\w-]', data), path


def test_a_benchmark_asks_for_a_local_original(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ffsplit.compress(small_job.config(tmp_path / "out"))
    assert main(["benchmark", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"was made from a local model, {small_job.model.name}: give its directory with --against" in line


def test_a_text_that_was_lent_is_found_beside_the_store_or_asked_for(
    small_job: SmallJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ffsplit.compress(small_job.config(tmp_path / "out"))
    job = [str(small_job.model), "--out", str(tmp_path / "again"), "--recipe", small_job.recipe()]
    job += ["--stats", str(tmp_path / "out"), "--runner", "serial", "--keep", "0.4"]
    assert main(["compress", *job]) == 0
    small_job.text.rename(tmp_path / "moved.txt")
    assert main(["compress", *job[:-1], "0.3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "was collected on text.txt" in line and line.endswith("as --calibration")
    assert main(["compress", *job[:-1], "0.3", "--calibration", str(tmp_path / "moved.txt")]) == 0
