"""A traceback is shown to nobody who did not ask for one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ffsplit.cli import main
from ffsplit.errors import ConfigError, StoreError
from ffsplit.exit_codes import (
    DEBUG_VARIABLE,
    DONE,
    FAILED,
    MISTAKE,
    QUIET,
    exit_code_of,
    quiet_libraries,
)
from ffsplit.models import checkpoint
from tests.small_jobs import SmallJob

ERRORS = [
    RuntimeError("a\nb"),
    Exception(),
    KeyError("k"),
    RecursionError("deep"),
    OSError(5, "x"),
]


def raising(error: BaseException) -> Any:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_is_one_line(error: Exception, capsys: Any) -> None:
    assert exit_code_of(raising(error)) == FAILED
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"ffsplit: unexpected error, {type(error).__name__}: ")
    assert "--debug" in captured.err


def test_a_lack_of_memory_is_told_with_what_needs_less(capsys: Any) -> None:
    assert exit_code_of(raising(MemoryError("no room"))) == FAILED
    told = "ffsplit: out of memory, MemoryError: no room; give fewer --workers, or --block-by-block\n"
    assert capsys.readouterr().err == told


def test_a_missing_dependency_is_a_mistake_in_the_installation(capsys: Any) -> None:
    """ffsplit's own modules cannot be missing: that is a bug."""
    assert exit_code_of(raising(ModuleNotFoundError("No module named 'boto3'", name="boto3"))) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("ffsplit: boto3 is not installed: ") and said.count("\n") == 1
    assert exit_code_of(raising(ModuleNotFoundError("No", name="ffsplit.absent"))) == FAILED


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("a"), MISTAKE), (StoreError("a"), FAILED), (ValueError("a"), FAILED)]
)
def test_debug_shows_where_and_why(error: Exception, code: int, capsys: Any, monkeypatch: Any) -> None:
    error.__cause__ = LookupError("the cause")
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    assert exit_code_of(raising(error)) == code
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "the cause" in printed and "in run" in printed
    assert printed.splitlines()[-1].startswith("ffsplit: ")


def test_debug_shows_what_a_line_leaves_out(capsys: Any, monkeypatch: Any) -> None:
    def run() -> int:
        try:
            raise LookupError("what it came from")
        except LookupError:
            raise ConfigError("what to do") from None

    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    assert exit_code_of(run) == MISTAKE
    assert "what it came from" in capsys.readouterr().err


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_sigterm_is_the_main_threads(in_main_thread: bool) -> None:
    """Another thread may not say what a signal does; the command runs all the same."""
    during: list[Any] = []

    def run() -> int:
        during.append(signal.getsignal(signal.SIGTERM))
        return DONE

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        code = exit_code_of(run) if in_main_thread else pool.submit(exit_code_of, run).result()
    assert code == DONE
    assert (during[0] != before) == in_main_thread
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def newer_tokenizer(small_job: SmallJob, tmp_path: Path) -> SmallJob:
    """A model whose tokenizer.json a later `tokenizers` wrote; this one raises a bare Exception."""
    model = tmp_path / "model"
    shutil.copytree(small_job.model, model)
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": {"type": "OfTheFuture"}}))
    small_job.model = model
    return small_job


@pytest.mark.parametrize("place", ["before", "after", "nowhere"])
def test_the_flag_goes_before_the_command_or_after(
    newer_tokenizer: SmallJob, tmp_path: Path, place: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "")  # which the flag sets, for processes that the command starts
    before, after = (["--debug"] if place == each else [] for each in ("before", "after"))
    arguments = newer_tokenizer.arguments(tmp_path / "out", "--runner", "serial", *after)
    assert main([*before, "compress", *arguments]) == MISTAKE
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) == (place != "nowhere")
    line = printed.splitlines()[-1]
    assert line.startswith(
        f"ffsplit: {newer_tokenizer.model} has no tokenizer that loads: data did not match"
    )
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fails_before_the_first_write_is_exit_code_2(
    small_job: SmallJob, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def read(*_: Any) -> str:
        raise OSError(5, "Input/output error", "/disk/model.safetensors")

    monkeypatch.setattr(checkpoint, "digest_files", read)
    assert main(["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")]) == MISTAKE
    error = capsys.readouterr().err
    assert error == "ffsplit: the job cannot be checked: Input/output error: /disk/model.safetensors\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.subprocess
def test_a_process_of_its_own_prints_no_traceback(newer_tokenizer: SmallJob, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ffsplit.cli", "compress", *newer_tokenizer.arguments(tmp_path / "out")]
    done = subprocess.run([*command, "--runner", "serial"], capture_output=True, text=True)
    assert done.returncode == MISTAKE and done.stdout == ""
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("ffsplit: ")


WARNING_LIBRARY = """\
import logging, subprocess, sys, warnings
from ffsplit.cli.commands import COMMANDS
from ffsplit.cli import main

def warn(parsed):
    warnings.warn("a warning of a library")
    logging.getLogger("library").warning("a logged warning")
    logging.getLogger("library").error("a logged error")
    child = "import warnings; warnings.warn('a warning of a child')"
    return subprocess.run([sys.executable, "-c", child]).returncode

COMMANDS["recipes"] = warn
sys.exit(main([*sys.argv[1:], "recipes"]))
"""


@pytest.mark.subprocess
def test_warnings_of_other_libraries_are_for_debugging() -> None:
    def printed(*flags: str, **variables: str) -> list[str]:
        command = [sys.executable, "-c", WARNING_LIBRARY, *flags]
        hidden = (DEBUG_VARIABLE, *QUIET)
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        found = subprocess.run(command, capture_output=True, text=True, env=environment | variables)
        assert found.returncode == DONE, found.stderr
        said = re.findall(r"a warning of a library|a logged \w+|a warning of a child", found.stderr)
        return sorted(set(said))

    everything = ["a logged error", "a logged warning", "a warning of a child", "a warning of a library"]
    assert printed() == ["a logged error"]
    assert printed("--debug") == everything
    assert "a warning of a library" in printed(PYTHONWARNINGS="default")


def test_what_is_quiet_in_a_command_is_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_VERBOSITY", "info")
    before, filters = dict(os.environ), list(warnings.filters)
    with quiet_libraries():
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error" and os.environ["HF_HUB_VERBOSITY"] == "info"
        assert logging.lastResort is not None and logging.lastResort.level == logging.ERROR
    assert dict(os.environ) == before and warnings.filters == filters
    assert logging.lastResort.level == logging.WARNING
