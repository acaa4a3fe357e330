"""The index of a zoo: every model with its figures and gates, and the trend over the batches."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ffsplit.cli.batch_lines import print_batch
from ffsplit.store.local import LocalStore
from ffsplit.store.manifest import GateResult, Spread
from ffsplit.zoo.batch import (
    Batch,
    BatchModel,
    Cost,
    Difference,
    Figures,
    ModelResult,
    Promotion,
    State,
    batch_key,
    past_batches,
    save_batch,
)
from ffsplit.zoo.page import render_index, sparkline
from tests.browser import dom_of, needs_browser, sideways

GATE = GateResult(gate="fidelity >= 0.98", figure=0.97, met=False)


def model(name: str, state: State, *, fidelity: float = 0.97) -> BatchModel:
    figures = Figures(
        parameters=(1000, 800),
        size_bytes=(4000, 3000),
        speedups={"1x128": 1.4, "8x128": 1.6},
        spreads={"8x128": Spread(p10=1.44, p90=1.81, low=None, high=None)},
        noise="timings are noisy: <very>",
        fidelity={"token_cosine": 0.9, "pooled_cosine": fidelity},
        tasks={"sts dev.csv, spearman": (86.72, 86.5)},
    )
    gates = (GATE,) if state == "refused" else ()
    result = None
    if state not in ("failed", "interrupted"):
        result = ModelResult(
            state=state,
            run_key="k",
            attempt="a",
            report="k/a/report.html",
            keep=0.35,
            figures=figures,
            gates=gates,
        )
    error = "<b>out of memory</b>" if state == "failed" else None
    return BatchModel(
        name=name,
        model=name,
        recipe="fast",
        state=state,
        result=result,
        error=error,
        num_attempts=3,
        wall_s=61,
    )


def batch(day: int, *models: BatchModel) -> Batch:
    return Batch(
        id=f"202601{day:02d}T030000Z-abcdef",
        zoo="nightly",
        zoo_digest="d",
        destination="/zoo",
        started_at=f"2026-01-{day:02d}T03:00:00+00:00",
        finished_at=f"2026-01-{day:02d}T03:10:00+00:00",
        ffsplit_version="0.1.0",
        max_models_in_flight=2,
        models=models,
    )


ALL = (
    model("new", "published"),
    model("old", "committed already"),
    model("off", "refused"),
    model("bad", "failed"),
)


def test_every_model_is_there_with_its_figures_and_gates() -> None:
    page = render_index([batch(1, *ALL)])
    text = " ".join(re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ").split())
    for expected in ("2 of 4", "1 in this batch, 1 earlier", "refused by gates", "published before"):
        assert expected in text
    for expected in ("3.00 kB", "\u221225.0 %", "1.40\u00d7", "1.60\u00d7", "86.50", "\u22120.22", "0.970"):
        assert expected in text
    assert "fidelity &gt;= 0.98: 0.97, NOT met" in page
    assert 'href="new/k/a/report.html"' in page
    assert "&lt;b&gt;out of memory&lt;/b&gt;" in page and "3 attempts" in text


def test_the_page_loads_nothing() -> None:
    """Its one script is in the page, and no other may run."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag in ("link", "img", "iframe"):
                found.append(tag)
            found.extend(value for name, value in attrs if name == "src" and value)

    page = render_index([batch(1, *ALL), batch(2, *ALL)])
    Reader().feed(page)
    assert not found and "url(" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.replace("&#39;", "'")
    assert len(script.splitlines()) < 30


def test_the_trend_has_a_line_for_every_model_and_gaps_where_it_failed() -> None:
    earlier = [batch(1, model("new", "published", fidelity=0.95)), batch(2, model("new", "failed"))]
    page = render_index([*earlier, batch(3, *ALL)])
    assert "Over the last 3 batches" in page
    assert "0.950 to 0.970 over 3 batches" in page
    strip = page[page.index('class="strip"') :].split("</ul>")[0]
    assert re.findall(r'li class="([\w-]+)"', strip) == ["published", "failed", "published"]
    assert "Over the last" not in render_index([batch(1, *ALL)])


def test_a_sparkline_of_one_value_or_of_equal_ones_is_level() -> None:
    assert 'points="3.0,13.0"' in sparkline([1.5])
    assert 'points="3.0,13.0 117.0,13.0"' in sparkline([2.0, 2.0])
    assert sparkline([None, None]) == "&ndash;"


def test_past_batches_come_oldest_first_without_what_cannot_be_read(tmp_path: object) -> None:
    store = LocalStore(tmp_path)  # type: ignore[arg-type]
    for day in (3, 1, 2):
        save_batch(store, batch(day, *ALL))
    store.put_bytes(batch_key("20260102T000000Z-000000"), b"{}")
    found = past_batches(store, before=batch(3).id)
    assert [each.started_at[8:10] for each in found] == ["01", "02"]
    assert found[0] == batch(1, *ALL)


def test_the_exit_code_says_the_worst() -> None:
    assert batch(1, *ALL[:2]).exit_code == 0
    assert batch(1, *ALL[:3]).exit_code == 3
    assert batch(1, *ALL).exit_code == 1
    assert batch(1, *ALL, model("cut", "interrupted")).exit_code == 130


def test_what_was_interrupted_is_counted_apart() -> None:
    page = render_index([batch(1, *ALL), batch(2, *ALL, model("cut", "interrupted"))])
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "Interrupted 1 stopped before they finished" in text
    assert "2 of 5" in text and "Interrupted" not in render_index([batch(1, *ALL)]).split("Batches")[0]


def test_speed_ups_have_their_spread_and_noise_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    newest = batch(1, model("tiny", "published"))
    page = render_index([newest])
    assert "1.44 to 1.81\u00d7" in page and "timings are noisy: &lt;very&gt;" in page
    print_batch(newest, destination="out")
    assert "speed-up 1.40\u00d7, fidelity 0.970, timings are noisy: <very>" in capsys.readouterr().out


def test_an_undecided_gate_is_called_so() -> None:
    undecided = GateResult(gate="speedup >= 1.4", figure=1.4, met=False, undecided=True, low=1.3, high=1.5)
    refused = model("tiny", "refused")
    assert refused.result is not None
    refused = refused.model_copy(update={"result": refused.result.model_copy(update={"gates": (undecided,)})})
    assert "speedup &gt;= 1.4: 1.4, UNDECIDED" in render_index([batch(1, refused)])


def test_a_line_per_model_says_what_became_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """With its unmet gates below it; what failed has its error instead of figures."""
    bad = model("bad", "refused")
    assert bad.result is not None
    met = GateResult(gate="parameters reduction >= 1%", figure=20, met=True)
    bad = bad.model_copy(update={"result": bad.result.model_copy(update={"gates": (met, GATE)})})
    three = batch(1, model("good", "published"), bad, model("ill", "failed"))
    print_batch(three, destination="out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("good: published, 3.00") and lines[1].startswith("bad: refused by gates, 3.00")
    assert lines[2:5] == [
        "  gate fidelity >= 0.98: 0.97, NOT met",
        "ill: failed: <b>out of memory</b>",
        "1 of 3 published (1 now), 1 refused by gates, 1 failed",
    ]


def test_a_batch_without_timings_has_no_speed_up_tile() -> None:
    timed = model("tiny", "published")
    assert timed.result is not None and timed.result.figures is not None
    figures = timed.result.figures.model_copy(update={"speedups": {}, "spreads": {}, "noise": None})
    result = timed.result.model_copy(update={"figures": figures})
    page = render_index([batch(1, timed.model_copy(update={"result": result}))])
    assert '<p class="label">Speed-up</p>' in render_index([batch(1, timed)])
    assert '<p class="label">Speed-up</p>' not in page


def changed(each: BatchModel, **fields: object) -> BatchModel:
    assert each.result is not None
    return each.model_copy(update={"result": each.result.model_copy(update=fields)})


def test_a_new_run_links_to_what_changed() -> None:
    """And names both revisions, and both runs' figures."""
    inputs = {"model": "1", "recipe": "1"}
    old = changed(model("tiny", "published", fidelity=0.95), commit="0" * 40, inputs=inputs)
    new = changed(
        model("tiny", "published"),
        run_key="l",
        commit="f" * 40,
        report="l/b/report.html",
        inputs=inputs | {"model": "2", "recipe": "2"},
    )
    new = new.model_copy(update={"revision": "main", "commit": "f" * 40})
    page = render_index([batch(1, old), batch(2, model("other", "failed")), batch(3, new, *ALL[:1])])
    assert '<a href="#change-tiny">what changed</a>' in page and 'id="change-tiny"' in page
    assert "<li>new revision ffffffff (before: 00000000)</li><li>new recipe</li>" in page
    assert 'href="tiny/k/a/report.html">the run before' in page and "tiny/l/b/report.html" in page
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "pooled cosine 0.950 0.970 +0.0200" in text and "main: ffffffff" in text
    assert 'id="change-new"' not in page
    assert "What changed" not in render_index([batch(1, old), batch(2, old)])


def test_the_run_before_and_the_one_in_use_are_compared_once_if_they_are_one() -> None:
    old = changed(model("tiny", "published", fidelity=0.95), inputs={"model": "1"})
    new = changed(model("tiny", "published"), run_key="l", inputs={"model": "2"})
    size = Difference(what="size", unit="bytes", before=2000, after=3000)
    assert old.result is not None
    for current, headings in ((old.result.run_key, ["Before, in use"]), ("other", ["Before", "In use then"])):
        promotion = Promotion(alias="production", outcome="promoted", current=current, differences=(size,))
        page = render_index([batch(1, old), batch(2, new.model_copy(update={"promotion": promotion}))])
        found = re.findall(r'class="num">(Before, in use|Before|In use then)</th>', page)
        assert found == headings


def test_what_is_in_use_and_what_it_cost() -> None:
    worse = GateResult(gate="sts drop <= 0.2 of current", figure=1.5, met=False)
    promotion = Promotion(
        alias="production",
        outcome="refused",
        current="a" * 16,
        gates=(worse,),
        differences=(Difference(what="size", unit="bytes", before=2000, after=3000),),
    )
    cost = Cost(stages=(), cpu_s=120, gpu_s=60, price=1.25)
    shown = model("tiny", "published").model_copy(update={"promotion": promotion, "cost": cost})
    page = render_index([batch(1, shown)])
    text = " ".join(re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ").split())
    assert "production: not in use: a regression gate failed" in text
    assert "sts drop &lt;= 0.2 of current: 1.5, NOT met" in text and "size 2.00 kB 3.00 kB +50.0 %" in text
    assert "Cost 1.25 by the zoo file" in text and "2 min 0 s of cores, 1 min 0 s of GPUs" in text
    assert 'data-cost="1.25"' in page and 'data-size="3000"' in page
    assert "by the zoo file" not in render_index([batch(1, *ALL)])


@pytest.mark.subprocess
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_scrolled_sideways(tmp_path: Path, width: int) -> None:
    """With every kind of tile, all columns, and a model that replaced another."""
    inputs = {"model": "1"}
    old = changed(model("tiny", "published", fidelity=0.95), inputs=inputs)
    new = changed(model("tiny", "published"), run_key="l", inputs={"model": "2"})
    figures = tuple(
        Difference(what=what, unit="fidelity", before=0.95123, after=0.97123)
        for what in ("compressed perplexity", "speed-up at 8x128")
    )
    promotion = Promotion(alias="production", outcome="promoted", current="c" * 16, differences=figures)
    cost = Cost(stages=(), cpu_s=1234567, gpu_s=2345, price=0.000626)
    new = new.model_copy(update={"promotion": promotion, "cost": cost})
    page = render_index([batch(1, old, *ALL), batch(2, new, *ALL)])
    assert len(re.findall(r"class=\"tile\b(?!s)", page)) == 7
    assert sideways(page, tmp_path, width=width) == ""


@pytest.mark.subprocess
@needs_browser
def test_the_models_are_sorted_and_filtered(tmp_path: Path) -> None:
    """In a browser, by what a person does: choose and type."""
    names = {"slow": 0.91, "best": 0.99, "mid": 0.95}
    page = render_index(
        [batch(1, *(model(name, "published", fidelity=f) for name, f in names.items()), ALL[3])]
    )
    acts = {
        "": (["slow", "best", "mid", "bad"], []),
        'put("sort", "-fidelity")': (["best", "mid", "slow", "bad"], []),
        'put("sort", "fidelity")': (["slow", "mid", "best", "bad"], []),
        'put("sort", "name")': (["bad", "best", "mid", "slow"], []),
        'put("find", "MI")': (["slow", "best", "mid", "bad"], ["slow", "best", "bad"]),
        'put("state", "failed")': (["slow", "best", "mid", "bad"], ["slow", "best", "mid"]),
    }
    put = (
        'const put = (id, value) => { control(id).value = value; tools.dispatchEvent(new Event("input")); };'
    )
    for act, (order, hidden) in acts.items():
        acted = re.sub(r"; script-src [^;\"]*", "; script-src 'unsafe-inline'", page)
        shown = dom_of(acted.replace("</body>", f"<script>{put}{act}</script></body>"), tmp_path)
        rows = re.findall(r'<tr data-name="(\w+) fast"([^>]*)>', shown)
        assert [name for name, _ in rows] == order, act
        assert [name for name, rest in rows if "hidden" in rest] == hidden, act
        assert re.search(r'<p class="tools" id="tools">', shown)
