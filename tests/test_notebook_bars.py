"""Progress in a notebook: one output per call, replaced while the bars move."""

from __future__ import annotations

import threading

import pytest

from ffsplit.notebook_bars import NotebookBars
from ffsplit.progress import Progress
from tests.kernel import kernel
from tests.small_jobs import SmallJob
from tests.test_progress import Terminal


@pytest.mark.subprocess
def test_a_run_is_one_output_of_its_cell(small_job: SmallJob) -> None:
    with kernel() as started:
        fields = small_job.config(small_job.folder / "out").model_dump(exclude_unset=True)
        found = started.run(f"import ffsplit; manifest = ffsplit.compress(**{fields})")
        again = started.run(f"manifest = ffsplit.compress(**{fields})")
    assert found.error is None and "calibrate" not in found.streams.get("stderr", "")
    ((identity, states),) = found.displays.items()
    assert identity != "none" and len(states) > 2
    lines = states[-1]["text/plain"].splitlines()
    assert lines[0].startswith("pre-flight: ") and lines[1].startswith("run ")
    bars = [line.split() for line in lines if "━" in line]
    assert [bar[:2] for bar in bars] == [["1/3", "calibrate"], ["2/3", "compress"], ["3/3", "measure"]]
    assert [bar[3] for bar in bars] == ["5/5", "3/3", "1/1"]
    assert states[-1]["text/html"].startswith("<pre") and "3/3 measure" in states[-1]["text/html"]
    assert "is committed already" in again.displays.popitem()[1][-1]["text/plain"]


def test_what_is_noted_is_text_and_not_html() -> None:
    bars = NotebookBars()
    bars.console.print("<b>model</b>", markup=False, highlight=False)
    shown = bars._repr_mimebundle_()
    assert "&lt;b&gt;model&lt;/b&gt;" in shown["text/html"]
    assert shown["text/plain"].startswith("<b>model</b>\n")


@pytest.mark.parametrize("in_notebook", [True, False])
def test_drawing_never_waits_for_the_stage(in_notebook: bool) -> None:
    """Bars are drawn by threads that hold the bars' own lock, for which a stage that moves on waits."""
    shown = Progress(Terminal(), in_notebook=in_notebook)
    shown.start("calibrate", 3)
    shown.advance()
    bars = shown._bars
    assert bars is not None
    with shown._lock:
        drawing = threading.Thread(target=lambda: bars.console.print(bars), daemon=True)
        drawing.start()
        drawing.join(20)
        assert not drawing.is_alive()


def test_bars_that_an_interrupt_keeps_from_starting_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    shown = Progress(Terminal())
    bars = shown._bars
    assert bars is not None
    monkeypatch.setattr(threading.Thread, "start", interrupt)
    with pytest.raises(KeyboardInterrupt), shown:
        pytest.fail("unreachable")
    assert not bars.live.is_started and shown._ended.is_set()
