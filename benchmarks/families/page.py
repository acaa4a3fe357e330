"""The page of `python -m benchmarks.families`: what works with which model type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OUTCOMES = {
    "right": "right",
    "right in part": "right, for the FFNs that the run compresses",
    "right, outputs not compared": "right by its tensors; outputs not compared",
    "no FFN, refused": "has no FFN of linear layers, and is refused",
    "refused": "refused",
    "traceback": "fails with a traceback",
    "silently wrong": "silently wrong",
    "found": "all FFNs found; not compressed",
    "partly found": "some FFNs found; not compressed",
    "found others": "finds what is no FFN; not compressed",
    "found where none": "finds FFNs where there are none; not compressed",
    "not built": "not tried",
}
"""Outcomes and their words, in the order of the page."""
READS = {
    ("text", "states"): "text",
    ("text", "next_tokens"): "running text",
    ("text", "target"): "pairs of texts",
    ("image", "states"): "pictures",
    ("sound", "states"): "sound",
    ("video", "states"): "videos",
    ("sound+text", "target"): "sound and its transcript",
}
"""The calibration data of models, by what a row holds and what they make."""
WORDS = {"image": "pictures", "sound": "sound", "text": "texts", "video": "videos"}
WITH_TABLE = ("right", "right in part", "right, outputs not compared", "found")


def write_page(records: Sequence[Record], path: Path) -> None:
    """Totals, a table of what works, and a list of the rest by outcome."""
    records = sorted(records, key=lambda record: record["type"])
    totals = Counter(record["outcome"] for record in records)
    with_ffns = sum(bool(each.get("num_ffns")) or each["outcome"] in WITH_TABLE for each in records)
    lines = [
        "# Models",
        "",
        f"Made by `make bench-families`, which tries {len(records)} model types of transformers on tiny",
        f"random models. {with_ffns} were built and have FFNs. Each is compressed twice. Keeping everything",
        "must change no bit of its outputs. Keeping half must give the outputs of the original with the",
        "other neurons set to zero, and must count every FFN. *Without ffsplit* tells whether half of it",
        "loads with transformers alone.",
        "",
        "| outcome | types |",
        "|---|---|",
        *(f"| {words} | {totals[name]} |" for name, words in OUTCOMES.items() if totals[name]),
    ]
    for name, words in OUTCOMES.items():
        chosen = [record for record in records if record["outcome"] == name]
        if chosen:
            lines += ["", f"## {words[0].upper()}{words[1:]}", ""]
            lines += _table(chosen) if name in WITH_TABLE else _list(chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _table(records: Iterable[Record]) -> list[str]:
    head = [
        "| `model_type` | calibrated on | without ffsplit | healing | one block at a time | FFNs |",
        "|---|---|---|---|---|---|",
    ]
    return head + [_row(record) for record in records]


def _row(record: Record) -> str:
    plain = record.get("keep 0.5: plain")
    cells = (
        f"`{record['type']}`",
        _rows_in_words(record),
        "" if plain is None else "yes" if plain else "no",
        "yes" if record.get("heals") else "no",
        "yes" if record.get("streams") else "no",
        _ffns(record),
    )
    return f"| {' | '.join(cells)} |"


def _rows_in_words(record: Record) -> str:
    rows = record.get("rows", "")
    words = " and ".join(WORDS.get(each, each) for each in rows.split("+"))
    return READS.get((rows, record.get("makes", "")), words)


def _ffns(record: Record) -> str:
    """Number and place of the FFNs in words, as in `2 decoder.layers.*.fc2, 8 experts.down_proj`."""
    words = []
    for each in record.get("ffns", ()):
        if not each.get("optional"):
            path = each["down"].removesuffix(".weight").split(".")
            words.append(f"{each['count']} `{'.'.join(path[-4:])}`")
    return ", ".join(words)


def _list(records: Iterable[Record]) -> list[str]:
    lines = []
    for record in records:
        why = " ".join(str(record.get("why", "")).split())
        lines.append(f"- `{record['type']}` ({record['class']}){f': {why}' if why else ''}")
    return lines
