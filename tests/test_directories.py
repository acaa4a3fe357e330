"""No home, no name for the uid, no place for temporary files: it works, or one line says what to set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ffsplit import directories as home
from ffsplit import directories as temporary
from ffsplit.cli import main
from ffsplit.directories import LENT, home_directory, lend_ray_token, settle_home, user_path
from ffsplit.errors import ConfigError
from tests.small_jobs import SmallJob

NOBODY = 54321
AS_NOBODY = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),  # an interpreter in /root is read
]
READ_ONLY = """
mount --make-rprivate /
for place in "$PLACE" /tmp /var/tmp /dev/shm; do mount --bind $place $place; done
for place in /tmp /var/tmp /dev/shm /; do mount -o remount,bind,ro $place; done
[ -z "$TMPDIR" ] || mount -t tmpfs none "$TMPDIR"
exec "$@"
"""


def run(
    arguments: Sequence[str], *, before: Sequence[str] = (), cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command with a bare environment."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HF_HUB_OFFLINE") if name in os.environ}
    return subprocess.run(
        [*before, sys.executable, "-m", "ffsplit.cli", *arguments],
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def as_nobody(arguments: Sequence[str], *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    if os.getuid() != 0 or subprocess.run([*AS_NOBODY, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root, and setpriv")
    for folder in (cwd, *cwd.parents[:3]):
        folder.chmod(0o777)
    return run(arguments, before=AS_NOBODY, cwd=cwd, **environment)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = done.stderr.splitlines()
    assert line.startswith("ffsplit: ")
    return line


@pytest.mark.matrix(where=(None,))
@pytest.mark.subprocess
@pytest.mark.parametrize("where", [None, "/nonexistent", "/"])
def test_a_user_without_a_home_or_a_name(where: str | None, small_job: SmallJob, tmp_path: Path) -> None:
    given = {} if where is None else {"HOME": where}
    out = str(tmp_path / "out")
    made = as_nobody(["compress", *small_job.arguments(out, "--runner", "serial")], cwd=tmp_path, **given)
    assert made.returncode == 0, made.stderr
    assert "atplotlib" not in made.stderr
    for arguments in (
        ["pull", out, str(tmp_path / "copy")],
        ["pull", out],
        ["verify", str(tmp_path / "copy")],
        ["report", out, "--out", "page.html"],
        ["list", out],
    ):
        done = as_nobody(arguments, cwd=tmp_path, **given)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    assert not (tmp_path / "~").exists() and not (tmp_path / "no-home").exists()
    if where is None:
        for arguments in (["list", "~/x"], ["inspect", "~/m"], ["pull", out, "~/copy"]):
            done = as_nobody(arguments, cwd=tmp_path)
            assert done.returncode == 2
            assert f"{arguments[-1]}: this user has no home directory: set HOME" in one_line(done)


def test_what_libraries_are_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "USER"):
        monkeypatch.setenv(name, "")  # and so put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("uid")))
    assert home_directory() is None
    settle_home()
    lent = Path(os.environ["HOME"])
    assert lent.is_dir() and lent.name == LENT and os.environ["USER"] == f"uid-{os.getuid()}"
    settle_home()  # a process that was started by this one keeps it
    assert Path(os.environ["HOME"]) == lent
    with pytest.raises(ConfigError, match="~/x: this user has no home directory"):
        user_path("~/x")
    assert user_path("x/~y") == Path("x/~y")
    lend_ray_token()
    assert "RAY_AUTH_TOKEN" not in os.environ  # the lent home can hold it
    monkeypatch.setattr(home, "_is_writable", lambda _: False)
    lend_ray_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_who_has_a_home_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    settle_home()
    lend_ray_token()
    assert dict(os.environ) == before
    assert user_path("~/x") == tmp_path / "x" and user_path("~nobody-here/x") == Path("~nobody-here/x")


def test_a_home_that_cannot_be_written_stays_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold credentials to read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(home, "_is_writable", lambda _: False)
    settle_home()
    assert os.environ["HOME"] == str(tmp_path)


@pytest.mark.subprocess
@pytest.mark.parametrize("has_temporary_files", [False, True])
@pytest.mark.slow
def test_a_root_file_system_that_is_read_only(
    has_temporary_files: bool, small_job: SmallJob, s3_uri: str, tmp_path: Path
) -> None:
    """Publishing to s3:// needs temporary files: it works with TMPDIR, else one line says to set it."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("not allowed to make a mount namespace")
    settings = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY"))}
    settings |= {"PLACE": str(tmp_path), "HOME": "/root"}
    if has_temporary_files:
        (tmp_path / "tmp").mkdir()
        settings["TMPDIR"] = str(tmp_path / "tmp")
    arguments = ["compress", *small_job.arguments(s3_uri, "--runner", "serial")]
    done = run(
        arguments, before=["unshare", "-m", "bash", "-c", READ_ONLY, "bash"], cwd=Path("/"), **settings
    )
    if has_temporary_files:
        assert done.returncode == 0, done.stderr
        assert main(["verify", s3_uri]) == 0
    else:
        assert done.returncode == 2
        assert "temporary files cannot be written in /tmp, nor anywhere else: set TMPDIR" in one_line(done)


def test_without_temporary_files_what_needs_none_works(
    small_job: SmallJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(temporary.tempfile, "tempdir", None)
    monkeypatch.setattr(temporary.tempfile, "_get_default_tempdir", refuse)
    monkeypatch.setattr(temporary.os, "access", lambda path, mode: str(path) != str(tmp_path / "nowhere"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert main(["inspect", str(small_job.model)]) == 0
    assert main(["compress", *small_job.arguments(tmp_path / "out", "--runner", "serial")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"temporary files cannot be written in {tmp_path / 'nowhere'}, nor anywhere else" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.subprocess
@pytest.mark.slow
def test_ascii_output_and_names_that_are_not(small_job: SmallJob, tmp_path: Path) -> None:
    model = tmp_path / "mod\u00e8le-\U0001f511"
    shutil.copytree(small_job.model, model)
    out = tmp_path / "sortie-\u00e9"
    plain = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    plain |= {"TERM": "", "HOME": str(tmp_path)}
    arguments = [str(model), *small_job.arguments(out, "--runner", "serial")[1:]]
    done = run(["compress", *arguments], cwd=tmp_path, **(plain | {"PYTHONUTF8": "1"}))
    assert done.returncode == 0, done.stderr
    assert "UnicodeEncodeError" not in done.stderr and "sortie-\\u00e9" in done.stdout
    shown = run(["list", str(out), "--json"], cwd=tmp_path, **(plain | {"PYTHONUTF8": "1"}))
    assert shown.returncode == 0 and "mod\\u00e8le-\\ud83d\\udd11" in shown.stdout
