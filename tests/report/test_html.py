from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ffsplit.report.html import render_report
from tests.browser import needs_browser, sideways
from tests.report.conftest import measurement_fields

HOSTILE = '<script>alert("x")</script><img src=//evil.example/x onerror=alert(1)>'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, the ids, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data + " "

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if attributes.get("id")]


def read(html: str) -> str:
    return re.sub(r"\s+", " ", Page(html).text)


def test_the_headline_numbers_are_there(make_manifest, make_curves):
    text = read(render_report(make_manifest(), curves=make_curves(6)))
    for expected in (
        "sentence-transformers/all-MiniLM-L6-v2",
        "9f2c51e07ab3d846",
        "35.0 % of the FFN",
        "72.0 MB from 90.9 MB, \u221220.7 %",
        "18.0 M from 22.7 M, \u221220.8 %; \u221243.7 % without embeddings",
        "1.45\u00d7 at 32 \u00d7 128 tokens, cpu; 1.18\u00d7 to 1.45\u00d7 over all shapes",
        "0.988 close: cosine of mean-pooled states, held\u2011out text",
    ):
        assert (
            expected in text
            or expected.replace(" from", "from")
            .replace(" at 32", "at 32")
            .replace(" cosine of mean-pooled states", "cosine of mean-pooled states")
            in text
        )


def test_every_fact_of_the_manifest_is_there(make_manifest, make_curves):
    manifest = make_manifest()
    text = read(render_report(manifest, curves=make_curves(6)))
    facts = [manifest.model.revision, manifest.model.digest, manifest.model.tokenizer_digest, "apache-2.0"]
    facts += [manifest.calibration.text_digest, "builtin:pydoc", "2,048 in 8 shards", manifest.attempt]
    facts += [stage.key for stage in manifest.stages] + ["1 min 14 s", "2 min 34 s"]
    facts += [*manifest.environment.versions.values(), "AMD EPYC 7763", "8.32 GB"]
    facts += [fact for file in manifest.files for fact in (file.path, file.sha256)]
    facts += ["width 512", "77 dense + 1,459 at rank 64"]
    assert [fact for fact in facts if fact not in text] == []


def test_the_hardware_is_that_of_the_host_that_measured(make_manifest):
    manifest = make_manifest()
    measured = manifest.measurements.model_copy(update={"hardware": {"cpu": "Xeon", "gpu": "NVIDIA H200"}})
    text = read(render_report(manifest.model_copy(update={"measurements": measured}), curves=[]))
    assert all(fact in text for fact in ("Xeon", "NVIDIA H200", "8.32 GB"))
    assert "AMD EPYC 7763" not in text


def test_the_page_is_well_formed_and_its_ids_are_unique(make_manifest, make_curves):
    page = Page(render_report(make_manifest(), curves=make_curves(6)))
    assert page.stack == []
    assert len(page.ids) == len(set(page.ids))
    references = {
        reference
        for _, attributes in page.tags
        for name, value in attributes.items()
        for reference in re.findall(r"url\(#([^)]+)\)", value or "") + [value[1:]] * (name == "href")
    }
    assert references <= set(page.ids)


def test_nothing_is_loaded_from_anywhere(make_manifest, make_curves):
    html = render_report(make_manifest(), curves=make_curves(6))
    assert "http://" not in html and "https://" not in html and "@import" not in html
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_hostile_strings_are_escaped(make_manifest, make_curves):
    fields = make_manifest().model_dump()
    fields["model"] |= dict.fromkeys(("id", "revision", "digest", "architecture", "license"), HOSTILE)
    fields["recipe"] = {"name": HOSTILE, HOSTILE: [HOSTILE]}
    fields["calibration"] |= {"sources": (HOSTILE,), "text_digest": HOSTILE}
    fields["stages"] = [stage | {"name": HOSTILE, "key": HOSTILE} for stage in fields["stages"]]
    fields["environment"] = {"versions": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE}}
    fields["measurements"] |= {"fidelity": {HOSTILE: 0.5}, "device": HOSTILE, "dtype": HOSTILE}
    task = dict.fromkeys(("name", "spec", "metric"), HOSTILE)
    fields["measurements"]["tasks"] = (task_fields(**task, overlap_with_calibration=1),)
    fields |= {"run_key": HOSTILE, "attempt": HOSTILE, "created_at": HOSTILE, "nonce": HOSTILE}
    html = render_report(make_manifest(**fields), curves=make_curves(6))
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;" in html
    assert not {"script", "img"} & {tag for tag, _ in Page(html).tags}


def test_the_same_run_gives_the_same_bytes(make_manifest, make_curves):
    first = render_report(make_manifest(), curves=make_curves(6))
    assert render_report(make_manifest(), curves=make_curves(6)) == first


def test_statistics_alone_leave_out_what_was_not_measured(make_manifest, make_curves):
    layers = [layer | {"relative_error": None} for layer in make_manifest().model_dump()["layers"]]
    manifest = make_manifest(kind="statistics", plain=None, keep=None, measurements=None, layers=layers)
    html = render_report(manifest, curves=make_curves(6))
    page = Page(html)
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["heavy-hitters", "layers", "lineage", "run"]
    assert "Speed-up" not in page.text and "fidelity" not in page.text.lower() and "None" not in page.text
    assert "183\u00a0k" in page.text


def test_a_report_without_curves_layers_or_files(make_manifest):
    manifest = make_manifest(kind="statistics", keep=None, plain=None, measurements=None, layers=(), files=())
    html = render_report(manifest, curves=[])
    assert "<svg" not in html and "All 0 layers" not in html


def test_overlap_with_calibration_is_said_in_the_headline_and_by_the_numbers(make_manifest, make_curves):
    calibration = make_manifest().calibration.model_dump()
    overlapping = make_manifest(calibration=calibration | {"held_out_is_disjoint": False})
    text = read(render_report(overlapping, curves=make_curves(6)))
    assert "cosine of mean-pooled states, on calibration text" in text
    assert "The held-out text overlaps with the calibration text." in text
    assert "NOT disjoint from calibration" in text
    assert "which calibration did not use" in read(render_report(make_manifest(), curves=[]))


def test_a_model_that_became_slower_is_not_praised(make_manifest):
    measurements = make_manifest().measurements.model_dump()
    measurements["latency"] = [measurements["latency"][0] | {"speedup": 0.934}]
    text = read(render_report(make_manifest(measurements=measurements), curves=[]))
    assert "0.934\u00d7" in text and "slower than the original" in text


def test_a_language_model_is_judged_by_its_agreement(make_manifest):
    measurements = make_manifest().measurements.model_dump()
    values = {
        "kl_divergence": 0.0521,
        "top1_agreement": 0.99996,
        "original_perplexity": 23.41,
        "my_score": 0.5,
    }
    text = read(render_report(make_manifest(measurements=measurements | {"fidelity": values}), curves=[]))
    assert "Fidelity 0.9999 close: top-1 agreement, held\u2011out text" in text
    assert "KL divergence, nats per token 0.0521 fair" in text and "my score 0.500" in text
    assert "models with a KL divergence of at most 0.05 (close) had at most 8 % more perplexity" in text
    assert "those with at most 0.2 (fair) at most 39" in text


def task_fields(**changes):
    fields = {"name": "sts dev.csv", "spec": "sts:/data/dev.csv", "metric": "spearman", "digest": "ab" * 32}
    fields |= {"higher_is_better": True, "original": 86.72, "compressed": 86.204, "num_examples": 1500}
    return fields | {"overlap_with_calibration": 0} | changes


def test_the_only_task_is_in_the_headline(make_manifest):
    measurements = make_manifest().measurements.model_dump() | {"tasks": (task_fields(),)}
    text = read(render_report(make_manifest(measurements=measurements), curves=[]))
    assert "sts dev.csv 86.20 spearman, from 86.72, \u22120.52" in text
    assert "sts dev.csv spearman 86.72 86.20 \u22120.52 1,500" in text
    assert "in the calibration text too" not in text
    assert "Not scored" not in text
    without = read(render_report(make_manifest(), curves=[]))
    assert "Tasks \u2013 not scored on a task" in without and "such as sts:FILE.csv" in without


def test_several_tasks_are_a_table_alone(make_manifest):
    classified = {"name": "classification a.tsv", "spec": "classification:a.tsv"}
    tasks = (
        task_fields(overlap_with_calibration=3),
        task_fields(**classified, metric="accuracy"),
        task_fields(**classified, metric="f1", original=0.5, compressed=0.5),
    )
    measurements = make_manifest().measurements.model_dump() | {"tasks": tasks}
    page = Page(render_report(make_manifest(measurements=measurements), curves=[]))
    tiles = [attributes for _, attributes in page.tags if attributes.get("class") == "tile"]
    text = re.sub(r"\s+", " ", page.text)
    assert len(tiles) == 4
    assert "classification a.tsv F1 0.5000 0.5000 0.0000" in text
    assert text.count("in the calibration text too") == 1
    assert "3 evaluation sentences are in the calibration text too" in text


def test_missing_memory_fidelity_and_latency(make_manifest):
    measurements = make_manifest().measurements.model_dump()
    measurements |= {"fidelity": {}, "latency": (), "compressed_peak_memory_bytes": None}
    text = read(render_report(make_manifest(measurements=measurements), curves=[]))
    assert text.count("not measured") == 2 and "benchmarks" not in text
    assert "Peak memory" not in text and "Latency and throughput" not in text


def test_experts_are_named_and_the_starved_are_marked(make_manifest, make_curves):
    layers = [
        layer.model_copy(
            update={"name": f"layer 0 expert {i}", "num_tokens": 50 * i, "by_weight_norm": i < 2}
        )
        for i, layer in enumerate(make_manifest().layers)
    ]
    curves = [replace(curve, name=layer.name) for curve, layer in zip(make_curves(6), layers, strict=True)]
    html = render_report(make_manifest(layers=layers), curves=curves)
    text = read(html)
    assert "2 of the experts saw too few tokens for statistics" in text
    assert "layer 0 expert 0 (0), layer 0 expert 1 (50)" in text and "50, too few" in text
    assert html.count(">layer 0 expert 5<") >= 3, "in the legend, beside its error, in the table"
    assert ">layer 5<" not in html


@pytest.mark.parametrize("num_layers", [1, 80])
def test_one_layer_and_eighty(make_manifest, make_curves, num_layers):
    html = render_report(make_manifest(num_layers), curves=make_curves(num_layers))
    page = Page(html)
    many = num_layers == 80
    assert ("All 80 layers as a table" if many else "The layer as a table") in page.text
    assert ("in the top 5 %, 10 of 80" in page.text) == many
    tags = [tag for tag, _ in page.tags]
    assert tags.count("polyline") == num_layers and tags.count("rect") == 2 * 80 * many
    assert html.count('class="bars"') == (1 if many else 2)  # before and after, and errors if few
    assert len(html) < 150_000


def test_a_speed_up_stands_with_its_spread_and_the_load(make_manifest):
    page = render_report(make_manifest(), curves=[]).replace("\u00a0", " ")
    assert "1.34 to 1.52\u00d7" in page and "Load average 0.42 before and 1.71 after, on 2 CPUs" in page
    assert "noisy" not in page
    measurements = measurement_fields()
    measurements["latency"] = [measurements["latency"][0] | {"original_p95_ms": 64.2}]
    page = render_report(make_manifest(measurements=measurements), curves=[]).replace("\u00a0", " ")
    assert "Timings are noisy: at 1 \u00d7 32 tokens the original&#39;s p95 is 10.0 times its p50" in page
    assert "; noisy" in page


def test_an_undecided_gate_has_its_interval(make_manifest):
    gate = {"gate": "speedup >= 1.4", "figure": 1.4, "met": False, "undecided": True}
    page = render_report(make_manifest(gates=(gate | {"low": 1.3, "high": 1.52},)), curves=[])
    assert "1.3 to 1.52" in page and "UNDECIDED" in page


def test_the_result_comes_before_the_mechanism(make_manifest, make_curves):
    page = Page(render_report(make_manifest(), curves=make_curves(6)))
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    results = ["change", "fidelity", "tasks", "latency"]
    assert sections == [*results, "layers", "heavy-hitters", "lineage", "run"]


def test_the_page_has_the_line_that_loads_the_model(make_manifest):
    html = render_report(make_manifest(), curves=[])
    assert "AutoModel.from_pretrained(&#34;.&#34;)" in html
    statistics = make_manifest(kind="statistics", keep=None, plain=None, measurements=None)
    assert "Load it" not in render_report(statistics, curves=[])


def test_every_cell_of_a_stacked_row_has_its_columns_name(make_manifest, make_curves):
    """On a narrow page a row is a list of its cells: no number is reached by scrolling sideways."""
    measurements = make_manifest().measurements.model_dump() | {"tasks": (task_fields(),)}
    html = render_report(make_manifest(measurements=measurements), curves=make_curves(6))
    tables = re.findall(r"<table.*?</table>", html, re.DOTALL)
    assert len(tables) == 5  # tasks, latency, layers, stages, files
    for table in tables:
        assert 'class="stack"' in table
        body = table.partition("<tbody>")[2]
        cells = re.findall(r"<td([^>]*)>(.*?)</td>", body, re.DOTALL)
        assert cells and [text for names, text in cells if text and "data-label=" not in names] == []


def test_a_perplexity_stands_with_its_change(make_manifest):
    values = {"original_perplexity": 20.0, "compressed_perplexity": 21.0}
    measurements = make_manifest().measurements.model_dump() | {"fidelity": values}
    text = read(render_report(make_manifest(measurements=measurements), curves=[]))
    assert "perplexity, compressed 21.0 (+5.00 %)" in text


@pytest.mark.subprocess
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("num_layers", [6, 32])
def test_nothing_is_scrolled_sideways(make_manifest, make_curves, tmp_path, num_layers, width):
    page = render_report(make_manifest(num_layers=num_layers), curves=make_curves(num_layers))
    assert sideways(page, tmp_path, width=width) == ""
