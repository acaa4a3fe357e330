"""Batches for real: models in processes of their own, some of which are refused, fail, or are killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ffsplit.cli import main
from ffsplit.cli.tables import print_list
from ffsplit.errors import ConfigError
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from ffsplit.zoo import process
from ffsplit.zoo.run import run_zoo
from ffsplit.zoo.zoo_file import Zoo, load_zoo
from tests.small_jobs import SmallJob


def zoo_file(small_job: SmallJob, *models: dict[str, Any], **fields: Any) -> Path:
    path = small_job.folder / "zoo.yaml"
    defaults = {"model": str(small_job.model), "recipe": small_job.recipe(), "keep": 0.5}
    defaults |= {"calibration": str(small_job.text), "samples": 40, "max_length": 16}
    document = {"destination": str(small_job.folder / "zoo"), "defaults": defaults, "models": list(models)}
    path.write_text(yaml.safe_dump(document | fields), "utf-8")
    return path


def zoo(small_job: SmallJob, *models: dict[str, Any], **fields: Any) -> Zoo:
    return load_zoo(str(zoo_file(small_job, *models, **fields)))


def drivers(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "ffsplit.zoo.process" in child.cmdline()]


@pytest.mark.slow
def test_a_killed_model_is_tried_again_and_a_bad_one_stops_nobody(small_job: SmallJob) -> None:
    lines: list[str] = []

    def kill_once(line: str) -> None:
        lines.append(line)
        if "| run " in line and not any("SIGKILL" in each for each in lines):
            (driver,) = drivers(psutil.Process())
            driver.kill()
            lines.append("SIGKILL sent")

    models = [{"name": "killed"}, {"name": "missing", "model": "/none"}]
    asked = zoo(small_job, *models, max_models_in_flight=1, retries=1, backoff_s=0.1)
    batch = run_zoo(asked, runner="serial", say=kill_once)
    killed, missing = batch.models
    assert (killed.state, killed.num_attempts) == ("published", 2)
    assert any("killed | failed, retry in 0.1 s: its process was killed by SIGKILL" in line for line in lines)
    assert (missing.state, missing.num_attempts) == ("failed", 1)
    assert missing.error is not None and "none does not exist" in missing.error
    assert batch.exit_code == 1
    folder = Path(asked.destination)
    assert verify(str(folder / "killed")).ok
    assert not drivers(psutil.Process())

    again = run_zoo(zoo(small_job, {"name": "killed"}), runner="serial", say=lines.append)
    assert [model.state for model in again.models] == ["committed already"]
    assert again.models[0].result is not None and killed.result is not None
    assert again.models[0].result.run_key == killed.result.run_key
    assert again.exit_code == 0
    names = {path.name for path in (folder / "batches").iterdir()}
    assert names == {f"{batch.id}.json", f"{again.id}.json"}
    assert "Over the last 2 batches" in (folder / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_two_models_share_one_ray_and_only_what_passes_is_published(
    small_job: SmallJob, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = {"name": "strict", "gate": ["fidelity >= 0.99999", "parameters reduction >= 1%"]}
    file = zoo_file(small_job, {"name": "open", "gate": "fidelity >= 0.1"}, strict, max_models_in_flight=2)
    assert main(["zoo", str(file), "--json"]) == 3
    captured = capsys.readouterr()
    batch = json.loads(captured.out)
    assert [model["state"] for model in batch["models"]] == ["published", "refused"]
    assert [gate["met"] for gate in batch["models"][1]["result"]["gates"]] == [False, True]
    folder = small_job.folder / "zoo"
    assert verify(str(folder / "open")).ok
    assert not list((folder / "strict").glob("*/commit.json"))
    report = batch["models"][1]["result"]["report"]
    assert "NO" in (folder / "strict" / report).read_text()
    assert f'href="strict/{report}"' in (folder / "index.html").read_text()
    lines = captured.err.splitlines()
    assert "strict | refused: gate fidelity >= 0.99999: " in captured.err and "NOT met" in captured.err
    with pytest.raises(ConfigError, match=r"zoo publishes: list one of its models, such as .*/open "):
        print_list(open_store(str(folder)))

    def first(start: str) -> int:
        return next(index for index, line in enumerate(lines) if line.startswith(start))

    assert first("open | run ") < first("strict | refused") and first("strict | run ") < first(
        "open | published"
    )


@pytest.mark.matrix(sent=(signal.SIGINT,))
@pytest.mark.subprocess
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_batch_is_the_end_of_its_models(small_job: SmallJob, sent: signal.Signals) -> None:
    """And unless it is killed, it leaves its manifest: what had ended, and what was interrupted."""
    models = [{"name": "missing", "model": "/none"}, {"name": "one"}, {"name": "waits"}]
    file = zoo_file(small_job, *models, max_models_in_flight=1)
    batch = subprocess.Popen(
        [sys.executable, "-m", "ffsplit.cli", "zoo", str(file), "--runner", "serial", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert batch.stderr is not None
    assert any("one | run " in line for line in batch.stderr)
    (driver,) = drivers(psutil.Process(batch.pid))
    batch.send_signal(sent)
    out, err = batch.communicate(timeout=30)
    assert batch.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), err
    deadline = time.monotonic() + 15
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not driver.is_running() or driver.status() == psutil.STATUS_ZOMBIE
    folder = small_job.folder / "zoo"
    assert not list(folder.glob("one/*/commit.json"))
    if sent != signal.SIGKILL:
        (manifest,) = folder.glob("batches/*.json")
        states = {model["name"]: model["state"] for model in json.loads(manifest.read_text())["models"]}
        assert states == {"missing": "failed", "one": "interrupted", "waits": "interrupted"}
        assert json.loads(out) == json.loads(manifest.read_text())
        assert "interrupted" in (folder / "index.html").read_text()


def test_every_model_has_its_own_row(small_job: SmallJob) -> None:
    """Also one whose folder's name another model has: it needs a name of its own, and then fails alone."""
    other = {"model": str(small_job.folder / "none" / small_job.model.name), "name": "other"}
    with pytest.raises(ConfigError, match="are both named"):
        zoo(small_job, {}, {"model": other["model"]})
    batch = run_zoo(zoo(small_job, {"name": "one"}, other), runner="serial", say=lambda line: None)
    assert [(each.name, each.state) for each in batch.models] == [("one", "published"), ("other", "failed")]
    assert (batch.count("published"), batch.exit_code) == (1, 1)


@pytest.mark.slow
def test_an_attempt_that_takes_too_long_is_interrupted(small_job: SmallJob) -> None:
    asked = zoo(small_job, {"name": "slow"}, retries=0, attempt_hours=1e-7)
    (slow,) = run_zoo(asked, runner="serial", say=lambda line: None).models
    assert slow.state == "failed"
    assert slow.error == "interrupted: not done after 1e-07 h (attempt_hours of the zoo file)"


def test_a_process_that_ended_is_not_waited_for_by_what_it_started(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What outlives it holds its output open."""
    monkeypatch.setattr(process, "LAST_WORDS_WITHIN_S", 0.5)
    orphan = "import subprocess, sys; print('ffsplit: last words', flush=True); "
    orphan += "child = subprocess.Popen(['sleep', '600']); "
    orphan += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))"
    as_driver(tmp_path, f"{orphan}; sys.exit(1)\n", monkeypatch)
    said: list[str] = []
    ended = asyncio.run(process.run_process(small_job.config(tmp_path), said.append, within_s=60))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert ended[:3] == (1, "last words", None)
    assert said == ["ffsplit: last words"]


def as_driver(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models run by a script in the place of ffsplit's own."""
    fake = folder / "python"
    fake.write_text(f"#!{sys.executable}\n{script}")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


LONG = process.LONGEST_LINE + 9
ENDINGS: dict[str, tuple[str, tuple[int, str], list[str]]] = {
    "done without a result": ("", (0, "its process ended with exit code 0, but wrote no result"), []),
    "a signal with a name": (
        "import os; print('a', flush=True); os.kill(os.getpid(), 15)",
        (-15, "its process was killed by SIGTERM; last output: a"),
        ["a"],
    ),
    "a signal without one": (
        f"import os; print('a', flush=True); os.kill(os.getpid(), {signal.SIGRTMIN + 1})",
        (-signal.SIGRTMIN - 1, f"its process was killed by signal {signal.SIGRTMIN + 1}; last output: a"),
        ["a"],
    ),
    "an empty line": ("print('a\\n\\n  \\nb'); raise SystemExit(1)", (1, "b"), ["a", "b"]),
    "a line without end": (
        f"print('a\\n' + 'x' * {LONG} + '\\nb'); raise SystemExit(1)",
        (1, "b"),
        ["a", "b"],
    ),
    "silence": ("raise SystemExit(5)", (5, "its process ended with exit code 5 and printed nothing"), []),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_how_a_process_ended_is_told(
    case: str, small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, (code, words), lines = ENDINGS[case]
    as_driver(tmp_path, script, monkeypatch)
    said: list[str] = []
    ended = asyncio.run(process.run_process(small_job.config(tmp_path), said.append, within_s=60))
    assert (ended[:3], said) == ((code, words, None), lines)
    assert not ended.is_out_of_memory


def test_a_process_that_does_not_end_is_killed(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    as_driver(tmp_path, script, monkeypatch)
    monkeypatch.setattr(process, "STOP_WITHIN_S", 0.5)
    monkeypatch.setattr(process, "LAST_WORDS_WITHIN_S", 0.1)
    ended = asyncio.run(process.run_process(small_job.config(tmp_path), print, within_s=1))
    assert (ended.exit_code, ended.result) == (1, None) and "interrupted" in ended.last_words
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_process_that_cannot_be_started_is_tried_again(
    small_job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = zoo(small_job, {"name": "one"}, retries=1, backoff_s=0)
    monkeypatch.setattr(sys, "executable", str(small_job.folder / "none"))
    (one,) = run_zoo(asked, runner="serial", say=lambda line: None).models
    assert (one.state, one.num_attempts) == ("failed", 2)
    assert one.error is not None and "its process could not be run: " in one.error


def test_a_mistake_in_the_file_is_one_line(small_job: SmallJob, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--workers", "0"], []):
        file = zoo_file(small_job, {"name": "one"} if flags else {"nam": "one"})
        assert main(["zoo", str(file), "--runner", "serial", *flags]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
    assert not (small_job.folder / "zoo").exists()
