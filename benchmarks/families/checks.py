"""What is checked of one model type, for `python -m benchmarks.families`.

Nothing is believed that the product says of itself. Its FFNs are compared with the oracle's by the values of
their down projections. The neurons it kept are told by looking for each neuron's column among the rows and
columns of every tensor it wrote. The outputs must then be those of the dense model without the others.
"""

from __future__ import annotations

import copy
import re
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.families.inputs import Ran, first_that_runs, run
from benchmarks.families.oracle import Found, digest, ffns_of
from benchmarks.families.tiny import save, save_parts, tiny_model
from tests.tiny_rows import NUM_ROWS, calibration, richest_reads

Record = dict[str, Any]
TOLERANCE = 1e-4
"""Of outputs whose neurons are the same: sums of fewer terms round differently."""
RECIPE = """\
name: families
description: Keeps the neurons with the largest output norm and drops the rest, without a refit.
score: rms
heavy_share: 1
steps: [{kind: prune}]
calibration: {shard_size: 8, held_out: 4, sampled_tokens: 64}
measurement: {latency_shapes: [[1, 8]], latency_pairs: 1, peak_memory: false}
"""


def check(
    model_type: str, class_name: str, folder: Path, *, quick: bool, built: Callable[[], None] = lambda: None
) -> Record:
    """Build a type, and try the product on it. What goes wrong is in the record, never raised.

    `built` is called between the two.
    """
    record: Record = {"type": model_type, "class": class_name, "quick": quick}
    started = time.perf_counter()
    try:
        record |= _check(model_type, class_name, folder, quick=quick, built=built)
    except Exception as error:
        record |= {"outcome": "not built", "why": _last_line(error).replace(str(folder), "FOLDER")}
    record["seconds"] = round(time.perf_counter() - started, 2)
    return record


def _check(
    model_type: str, class_name: str, folder: Path, *, quick: bool, built: Callable[[], None]
) -> Record:
    model = tiny_model(model_type, class_name)
    found = ffns_of(model, model_type)
    needed = [ffn for ffn in found if not ffn.optional]
    record: Record = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "ffns": _summary(found),
        "num_ffns": len(needed),
        "ffn_elements": sum(ffn.elements for ffn in needed),
    }
    ran: Ran | None = None
    try:
        ran = first_that_runs(model, model_type) if found else None
        record["reads"] = ran.reads if ran else "not run"
    except Exception as error:
        record["no_forward"] = _last_line(error)
    source = folder / "model"
    without = save(model, source) or misfit(model, source, folder)
    if without:
        save_parts(model, source)
    built()
    record |= _finds(source, found, richest=not without)
    if without and "text" in record.get("rows", ""):
        record["no_processor"] = without
    if quick or record["outcome"] not in ("found", "partly found", "found others", "found where none"):
        return record
    return record | _compresses(model, source, found, ran, folder, richest=not without)


def misfit(model: Any, source: Path, folder: Path) -> str:
    """Why a tiny model does not run on what its tiny processor makes of a row; empty if it does."""
    from ffsplit.calibration.media import embedded, read_media
    from ffsplit.calibration.readers import make_reader
    from ffsplit.models.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(source)
        checkpoint = open_checkpoint(source, reads=richest_reads(checkpoint))
        if not checkpoint.reads_jointly or not checkpoint.architecture.may_read:
            return ""
        rows = read_media([calibration(checkpoint, folder)], reads=checkpoint.reads)
        reader = make_reader(checkpoint, max_length=16, batch_tokens=64)
        row = embedded(rows[0], reads=checkpoint.reads)
        batch = next(reader.batches(reader.encode([row])))
        run(model, dict(batch.arguments))
    except Exception as error:
        return _last_line(error)
    return ""


def _summary(found: list[Found]) -> list[Record]:
    """The FFNs in groups of the same place in each block, for people to read."""
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for ffn in found:
        name = re.sub(r"\.\d+(?=\.)", ".*", ffn.down)
        groups.setdefault((name, ffn.width, ffn.is_expert, ffn.optional), []).append(ffn)
    return [
        {"down": name, "width": width, "count": len(ffns), "elements": sum(ffn.elements for ffn in ffns)}
        | ({"experts": True} if experts else {})
        | ({"optional": True} if optional else {})
        for (name, width, experts, optional), ffns in groups.items()
    ]


def _finds(source: Path, expected: list[Found], *, richest: bool) -> Record:
    """Whether the product finds the oracle's FFNs in a checkpoint, for the richest rows that it can read."""
    from ffsplit.errors import FFSplitError
    from ffsplit.models.checkpoint import open_checkpoint

    needed = [ffn for ffn in expected if not ffn.optional]
    try:
        checkpoint = open_checkpoint(source)
        if richest:
            checkpoint = open_checkpoint(source, reads=richest_reads(checkpoint))
    except FFSplitError as error:
        outcome = "refused" if needed else "no FFN, refused"
        return {"outcome": outcome, "why": str(error).replace(str(source), "MODEL")}
    except Exception as error:
        return {"outcome": "traceback", "why": _last_line(error)}
    seen = Counter((place.shape.num_neurons, _stored_digest(source, place.down)) for place in checkpoint.ffns)
    known = Counter((ffn.width, ffn.digest) for ffn in expected)
    missing = [ffn for ffn in needed if not seen[ffn.width, ffn.digest]]
    extra = [
        place.down.name
        for place in checkpoint.ffns
        if not known[place.shape.num_neurons, _stored_digest(source, place.down)]
    ]
    record: Record = {
        "by": "structure" if checkpoint.is_guessed else "table",
        "rows": "+".join(checkpoint.reads),
        "makes": checkpoint.makes,
        "heals": checkpoint.can_heal,
        "streams": checkpoint.can_stream,
        "found": len(checkpoint.ffns),
        "missing": _summary(missing),
        "missing_elements": sum(ffn.elements for ffn in missing),
        "extra": sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in extra}),
    }
    if extra:
        return {**record, "outcome": "found others"}
    if not needed:
        return {**record, "outcome": "found where none"}
    return {**record, "outcome": "partly found" if missing else "found"}


def _stored_digest(source: Path, place: Any) -> str:
    """Of a matrix in a file, as [out, in]."""
    tensor = _tensor(source, place.name)
    tensor = tensor.view(place.flat, -1, tensor.shape[-1]) if place.flat else tensor
    tensor = tensor if place.expert is None else tensor[place.expert]
    return digest(tensor.T if place.transposed else tensor)


def _tensor(source: Path, name: str) -> Tensor:
    from safetensors import safe_open

    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    raise KeyError(name)


def _compresses(
    model: Any, source: Path, found: list[Found], ran: Ran | None, folder: Path, *, richest: bool
) -> Record:
    """Whether keeping all changes nothing, and keeping half drops neurons and no more."""
    record: Record = {}
    cls = type(model)
    dense = cls.from_pretrained(source).eval()
    before = run(dense, ran.inputs) if ran else []
    for keep in (1.0, 0.5):
        name = f"keep {keep:g}"
        try:
            manifest = _compress(source, keep=keep, out=folder / name, folder=folder, richest=richest)
        except Exception as error:
            return record | {**_refusal(error, source), "step": name}
        artifact = _artifact(folder / name)
        record[f"{name}: plain"] = manifest.plain
        try:
            loaded = _load(cls, artifact, folder / name, plain=bool(manifest.plain))
            after = run(loaded, ran.inputs) if ran else []
        except Exception as error:
            return record | {"outcome": "silently wrong", "step": f"{name}: load", "why": _last_line(error)}
        if keep == 1:
            record |= _same(name, before, after, tolerance=0)
        else:
            pruned, counted = _as_pruned(name, model, dense, artifact, found, manifest)
            expected = run(pruned, ran.inputs) if ran else []
            record |= _same(name, expected, after, tolerance=TOLERANCE) | counted
        if record.get("outcome"):
            return record | {"step": name}
        generates = _generates(loaded, dense, ran)
        if generates:
            return record | {"outcome": "silently wrong", "step": f"{name}: generate", "why": generates}
    if "left out" in record:
        return record | {"outcome": "right in part", "why": f"left out: {record['left out']}"}
    return record | {"outcome": "right" if ran else "right, outputs not compared"}


def _as_pruned(
    name: str, model: Any, dense: Any, artifact: Path, found: list[Found], manifest: Any
) -> tuple[Any, Record]:
    """The dense model with the neurons set to zero that an artifact lacks, and whether they are all told."""
    written = _vectors(artifact)
    pruned = copy.deepcopy(dense)
    kept_elements = all_elements = touched = aside = 0
    untouched = []
    with torch.no_grad():
        for ffn in found:
            matrix = ffn.matrix(model).float()
            keeps = torch.tensor([_bytes(column) in written for column in matrix.T])
            ffn.matrix(pruned)[:, ~keeps] = 0
            if ffn.optional and keeps.all():
                aside += ffn.elements
                continue
            all_elements += ffn.elements
            kept_elements += ffn.elements * int(keeps.sum()) // ffn.width
            touched += int(not keeps.all())
            if keeps.all():
                untouched.append(ffn)
    sizes = manifest.measurements
    claimed = sizes.compressed_size.ffn_elements / sizes.original_size.ffn_elements
    record: Record = {
        f"{name}: kept": round(kept_elements / max(all_elements, 1), 4),
        f"{name}: claimed": round(claimed, 4),
        f"{name}: touched": touched,
    }
    if untouched:
        names = [each["down"] for each in _summary(untouched)]
        if sizes.original_size.ffn_elements < 0.98 * all_elements:
            why = f"every neuron is kept of {names}"
            return pruned, {**record, "outcome": "silently wrong", "why": why}
        record["left out"] = names
    with_optional = (kept_elements + aside) / max(all_elements + aside, 1)
    if not record[f"{name}: kept"] - 0.02 <= claimed <= with_optional + 0.02:
        why = f"the tensors keep {record[f'{name}: kept']:.3f}, the manifest says {claimed:.3f}"
        return pruned, {**record, "outcome": "silently wrong", "why": why}
    return pruned, record


def _same(name: str, expected: list[Tensor], got: list[Tensor], *, tolerance: float) -> Record:
    """An outcome if outputs differ; otherwise by how much at most, relative to the largest value."""
    if [each.shape for each in expected] != [each.shape for each in got]:
        return {"outcome": "silently wrong", "why": f"{name}: other outputs than the dense model's"}
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        if not one.numel():
            continue
        one, other = (torch.nan_to_num(each, nan=12345.0, posinf=1e4, neginf=-1e4) for each in (one, other))
        worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp_min(1e-6)))
    record: Record = {f"{name}: difference": worst}
    if worst > tolerance:
        record |= {"outcome": "silently wrong", "why": f"{name}: outputs differ by {worst:.2g}"}
    return record


def _vectors(artifact: Path) -> set[bytes]:
    """Every row and column of every matrix that was written."""
    from safetensors.torch import load_file

    found: set[bytes] = set()
    for path in artifact.glob("*.safetensors"):
        for tensor in load_file(path).values():
            if tensor.dim() not in (2, 3) or not tensor.is_floating_point() or tensor.numel() > 2_000_000:
                continue
            for matrix in tensor.float() if tensor.dim() == 3 else [tensor.float()]:
                found.update(_bytes(row) for row in matrix)
                found.update(_bytes(column) for column in matrix.T)
    return found


def _bytes(vector: Tensor) -> bytes:
    return vector.detach().contiguous().numpy().tobytes()


def _compress(source: Path, *, keep: float, out: Path, folder: Path, richest: bool) -> Any:
    import ffsplit
    from ffsplit.models.checkpoint import open_checkpoint

    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, "utf-8")
    config = ffsplit.JobConfig(
        model=str(source),
        out=str(out),
        recipe=str(recipe),
        keep=keep,
        calibration=(calibration(open_checkpoint(source), folder, richest=richest),),
        samples=NUM_ROWS,
        max_length=16,
        runner="serial",
    )
    return ffsplit.compress(config)


def _artifact(out: Path) -> Path:
    """The folder of the one committed attempt."""
    (manifest,) = out.glob("*/*/manifest.json")
    return manifest.parent


def _load(cls: Any, artifact: Path, out: Path, *, plain: bool) -> Any:
    """With transformers alone where the manifest promises that: no tensor missing, left over or reshaped."""
    import ffsplit

    if not plain:
        return ffsplit.load(str(out)).eval()
    loaded, report = cls.from_pretrained(artifact, output_loading_info=True)
    wrong = {name: list(each)[:3] for name, each in report.items() if each and name != "unexpected_keys"}
    if wrong:
        raise ValueError(f"transformers reports {wrong}")
    return loaded.eval()


def _generates(loaded: Any, dense: Any, ran: Ran | None) -> str:
    """Why it does not generate though its original does, or nothing."""
    if ran is None or not getattr(dense, "can_generate", lambda: False)():
        return ""
    options = {"max_new_tokens": 3, "do_sample": False}
    inputs = {name: each for name, each in ran.inputs.items() if not name.startswith("decoder_")}
    try:
        dense.generate(**copy.deepcopy(inputs), **options)
    except Exception:
        return ""
    try:
        loaded.generate(**copy.deepcopy(inputs), **options)
    except Exception as error:
        return _last_line(error)
    return ""


def _refusal(error: Exception, source: Path) -> Record:
    from ffsplit.errors import FFSplitError

    if isinstance(error, FFSplitError):
        return {"outcome": "refused", "why": str(error).replace(str(source), "MODEL")}
    return {"outcome": "traceback", "why": _last_line(error)}


def _last_line(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def quiet() -> None:
    """No warnings of libraries: thousands of random models earn many."""
    import warnings

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def emptied(folder: Path) -> Path:
    """A fresh folder in this place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
