"""Closed, full and unread standard streams: no run ends by them, and no exit code changes its meaning."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ffsplit import logs, streams
from ffsplit.progress import Progress
from ffsplit.store.pull import verify
from ffsplit.store.store import open_store
from ffsplit.streams import Stream
from tests.small_jobs import SmallJob
from tests.store.attempts import publish

FULL, CLOSED, UNREAD = ">/dev/full", ">&-", "| true"


def exit_code(redirection: str, *arguments: str) -> int:
    """Of ffsplit under bash, with its standard streams as a user would redirect them."""
    command = shlex.join([sys.executable, "-m", "ffsplit.cli", *arguments])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {redirection}"], capture_output=True)
    return done.returncode


def errors(redirection: str, *arguments: str) -> list[str]:
    command = shlex.join([sys.executable, "-m", "ffsplit.cli", *arguments])
    done = subprocess.run(["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True)
    return done.stderr.splitlines()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    publish(open_store(str(tmp_path / "out")), tmp_path / "attempt")
    return tmp_path / "out"


@pytest.mark.subprocess
@pytest.mark.parametrize("stdout", [FULL, CLOSED, UNREAD])
def test_a_result_that_could_not_be_printed_is_not_0(published: Path, stdout: str) -> None:
    assert exit_code("", "verify", str(published)) == 0
    for arguments in (["verify", str(published)], ["list", str(published), "--json"], ["--help"]):
        assert exit_code(stdout, *arguments) == 1, arguments
        (line,) = errors(stdout, *arguments)
        assert line.startswith("ffsplit: the result could not be written to stdout: ")


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "redirection", [FULL, CLOSED, UNREAD, "2>&-", "2>/dev/full", "2>&1 | true", ">&- 2>&-"]
)
def test_a_damaged_artifact_is_one_whoever_reads_it(published: Path, redirection: str) -> None:
    next(published.glob("*/*/config.json")).write_text("damaged")
    assert exit_code(redirection, "verify", str(published)) == 1
    assert exit_code(redirection, "verify", str(published / "none")) == 2


@pytest.mark.subprocess
def test_a_listing_that_is_cut_short_is_not_0(published: Path) -> None:
    """Far more than a pipe holds, so that it breaks while it is printed."""
    code = "from ffsplit.exit_codes import checked_output, exit_code_of as run\n"
    code += "def show(): print('row\\n' * 100_000); return checked_output(0, is_result=True)\n"
    code += "raise SystemExit(run(show))"
    command = shlex.join([sys.executable, "-c", code])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "row\n")
    assert done.stderr == "ffsplit: the result could not be written to stdout: Broken pipe\n"


@pytest.mark.matrix(redirection=(">&- 2>&-",))
@pytest.mark.subprocess
@pytest.mark.parametrize("redirection", ["2>&1 | head -1", ">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_run_goes_on_and_is_committed(small_job: SmallJob, tmp_path: Path, redirection: str) -> None:
    out = tmp_path / "out"
    assert exit_code(redirection, "compress", *small_job.arguments(out, "--runner", "serial")) == 0
    assert verify(str(out)).ok


@pytest.mark.subprocess
@pytest.mark.slow
def test_a_manifest_that_was_asked_for_is_a_result(small_job: SmallJob, tmp_path: Path) -> None:
    """Also of a run that is committed, and of one that was refused, which says so in any case."""
    arguments = small_job.arguments(tmp_path / "out", "--runner", "serial", "--json")
    assert exit_code(FULL, "compress", *arguments) == 1
    assert verify(str(tmp_path / "out")).ok
    assert exit_code("", "compress", *arguments) == 0
    refused = small_job.arguments(
        tmp_path / "none", "--runner", "serial", "--json", "--require-speedup", "999"
    )
    assert exit_code(FULL, "compress", *refused) == 3


@pytest.mark.subprocess
@pytest.mark.slow
def test_a_batch_goes_on(small_job: SmallJob) -> None:
    fields = {"recipe": small_job.recipe(), "calibration": str(small_job.text), "samples": 40}
    models = [{"model": str(small_job.model), "name": name, **fields} for name in ("one", "two")]
    file = small_job.folder / "zoo.yaml"
    file.write_text(yaml.safe_dump({"destination": str(small_job.folder / "zoo"), "models": models}))
    assert exit_code("2>&1 | head -1", "zoo", str(file), "--runner", "serial") == 0
    for name in ("one", "two"):
        assert verify(str(small_job.folder / "zoo" / name)).ok


def broken_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


@pytest.mark.parametrize("kind", ["full", "closed", "unread", "missing"])
def test_a_stream_keeps_why_it_lost_something(kind: str) -> None:
    closed = io.StringIO()
    closed.close()
    lost = {"full": open("/dev/full", "w", buffering=1), "closed": closed, "unread": broken_pipe()}  # noqa: SIM115
    stream = Stream(lost.get(kind))
    assert not stream.isatty()
    assert stream.lost is None
    print("text", file=stream, flush=True)  # type: ignore[arg-type]
    assert stream.lost is not None


def test_what_cannot_be_flushed_at_the_end_is_dropped() -> None:
    """A buffer keeps what it could not write, and fails by it once more."""
    full = open("/dev/full", "w")  # noqa: SIM115
    stream = Stream(full)
    stream.write("text")
    assert stream.lost is None
    stream.end()
    assert "No space left" in str(stream.lost)
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_nothing_is_known_to_be_lost_where_no_command_line_runs() -> None:
    print("text")
    assert streams.lost_output() is None


def test_what_an_encoding_lacks_is_written_as_an_escape() -> None:
    data = io.BytesIO()
    stream = Stream(io.TextIOWrapper(data, encoding="ascii"))
    stream.write("\xb5")
    stream.flush()
    assert (data.getvalue(), stream.lost) == (b"\\xb5", None)


@pytest.mark.parametrize("kind", ["closed", "unread", "missing"])
def test_progress_and_logs_of_a_library_call_end_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no command line has made the streams safe."""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"closed": closed, "unread": broken_pipe()}.get(kind))
    with Progress.to_user() as shown:
        shown.start("calibrate", 2)
        shown.advance()
        shown.advance()
        shown.note("done")
    logs._Stderr().handle(logs._logger.makeRecord("ffsplit", 20, "", 0, "event", (), None))
    streams.note("done")
    stream = streams.stderr()
    stream.write("noted\n")
    stream.flush()
    assert stream.lost is not None  # so all of the above was lost, and raised nothing


@pytest.mark.subprocess
def test_a_file_that_is_opened_later_never_becomes_a_standard_stream(tmp_path: Path) -> None:
    """Whatever a library writes to descriptor 2 would go into it."""
    code = "import os, sys\nfrom ffsplit.streams import guarded\n"
    code += f"with guarded():\n    file = open({str(tmp_path / 'file')!r}, 'w')\n    os.write(2, b'noise')\n"
    code += "    raise SystemExit(file.fileno() < 3)"
    command = shlex.join([sys.executable, "-c", code])
    assert subprocess.run(["bash", "-c", f"{command} <&- >&- 2>&-"]).returncode == 0
    assert (tmp_path / "file").read_text() == ""
