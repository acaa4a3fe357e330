"""An interrupted call leaves a session in which the same call works, and resumes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ffsplit.interrupts import uninterrupted, whole_imports
from tests.kernel import kernel
from tests.small_jobs import SmallJob

INTERRUPTED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\ncomplete = True\n"


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported, by names of their own."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_interrupt_waits_for_the_end_of_an_import(importable: Path) -> None:
    (importable / "interrupted_outer.py").write_text("import interrupted_inner\ncomplete = True\n")
    (importable / "interrupted_inner.py").write_text(INTERRUPTED)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), whole_imports():
        __import__("interrupted_outer")
        time.sleep(60)
    assert sys.modules["interrupted_outer"].complete and sys.modules["interrupted_inner"].complete
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_outside_an_import_does_not_wait(importable: Path) -> None:
    """Even if all of this runs while a script is imported."""
    (importable / "interrupted_script.py").write_text(
        "import os, signal\nfrom ffsplit.interrupts import whole_imports\n"
        "try:\n    with whole_imports():\n        os.kill(os.getpid(), signal.SIGINT)\n        later = True\n"
        "except KeyboardInterrupt:\n    interrupted = True\n"
    )
    script = __import__("interrupted_script")
    assert script.interrupted and not hasattr(script, "later")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_is_not_handled_in_python_is_left_alone(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with whole_imports():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_must_end_ends_before_the_interrupt() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the work")
    assert done == ["the work"]


SESSION = """
import os, signal, threading, time
import psutil, ffsplit
from pathlib import Path
from ffsplit.progress import Progress

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def interrupt_first_import():
    while "torch" not in __import__("sys").modules:
        time.sleep(0.001)
    interrupt()

class Interrupting(Progress):
    stage = None

    def start(self, stage, total, **more):
        super().start(stage, total, **more)
        if stage == self.stage == "measure":
            threading.Timer(0.5, interrupt).start()

    def advance(self, *amount):
        super().advance(*amount)
        if self._stage == self.stage != "measure":
            interrupt()

def children():
    left, until = True, time.monotonic() + 60
    while left and time.monotonic() < until:  # Ray's processes end in the background
        left = sorted(process.name() for process in psutil.Process().children(recursive=True))
        time.sleep(0.1)
    return left
"""
RESUMED = {"calibrate": "calibrate", "compress": "calibrate compress", "measure": "calibrate compress"}
"""What is reused after an interrupt in each stage."""


@pytest.mark.subprocess
@pytest.mark.parametrize("runner", ["serial", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])])
def test_a_notebook_goes_on_after_an_interrupt(small_job: SmallJob, runner: str) -> None:
    """In the first import, and in every stage: nothing is left behind, and the same call resumes."""
    recipe = small_job.folder / "long.yaml"
    text = Path(small_job.recipe()).read_text("utf-8").replace("latency_pairs: 1,", "latency_pairs: 600,")
    recipe.write_text(text, "utf-8")
    config = small_job.config("unused", recipe=str(recipe), runner=runner, workers=2)
    fields = config.model_dump(exclude_unset=True, exclude={"out"})
    with kernel() as session:
        assert session.run(SESSION).error is None
        session.run(f"fields = {fields}; threading.Thread(target=interrupt_first_import).start()")
        first = session.run(f"ffsplit.compress(**fields, out={str(small_job.folder / 'first')!r})")
        assert first.error == "KeyboardInterrupt"
        threads = None
        for stage in ("calibrate", "compress", "measure"):
            out = small_job.folder / stage
            session.run(f"Interrupting.stage = {stage!r}")
            call = f"ffsplit.compress(**fields, out={str(out)!r}"
            found = session.run(f"{call}, progress=Interrupting.to_user())")
            assert found.error == "KeyboardInterrupt", (stage, found)
            assert len(found.displays) == 1, found.displays
            (states,) = found.displays.values()
            assert "the same command resumes from it" in states[-1]["text/plain"]
            assert session.value("children()") == "[]"
            threads = threads or session.value("threading.active_count()")
            assert session.value("threading.active_count()") == threads
            assert not [path for path in out.rglob("*") if "owners" in path.parts and path.is_file()]
            assert session.run(f"manifest = {call})").error is None
            reused = session.value("' '.join(stage.name for stage in manifest.stages if stage.num_reused)")
            assert reused == RESUMED[stage]
            assert {path.name for path in out.iterdir()} >= {"latest", "index.json"}
            assert not (out / ".scratch").exists()
