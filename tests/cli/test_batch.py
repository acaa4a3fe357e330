"""The commands about many models, and about jobs: what they refuse, and what an interruption leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffsplit.cli import main

Captured = pytest.CaptureFixture[str]


def zoo_file(folder: Path, destination: Path | str) -> str:
    (folder / "zoo.yaml").write_text(f"destination: {destination}\nmodels: [{{model: m, name: one}}]\n")
    return str(folder / "zoo.yaml")


@pytest.mark.parametrize("directory", ["zoo.yaml", "nowhere"])
def test_a_working_directory_that_is_none_is_one_line(
    tmp_path: Path, capsys: Captured, directory: str
) -> None:
    command = ["zoo", zoo_file(tmp_path, "/out")]
    assert main(["submit", "--working-dir", str(tmp_path / directory), *command]) == 2
    assert capsys.readouterr().err == f"ffsplit: --working-dir {tmp_path / directory} is not a directory\n"


def test_a_batch_in_a_job_publishes_to_an_absolute_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["zoo", zoo_file(tmp_path, "relative/out"), "--runner", "serial"], in_job=True) == 2
    assert "relative/out must be absolute in a job" in capsys.readouterr().err
    assert not (tmp_path / "relative").exists()


def test_a_batch_that_is_interrupted_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """As while a cluster is looked for."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ffsplit.zoo.run.share_cluster", interrupt)
    assert main(["zoo", zoo_file(tmp_path, tmp_path / "out"), "--runner", "serial"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("ffsplit: interrupted; published models stay, and the next batch skips them\n")
