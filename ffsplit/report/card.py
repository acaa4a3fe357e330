"""The model card of an artifact, as a hub renders and searches it, and the line that loads the artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import yaml

from ffsplit.ffn.shapes import Integer
from ffsplit.measurement.gates import describe_result
from ffsplit.models.source_card import ORIGINAL_CARD, SourceCard
from ffsplit.report.humanize import (
    count,
    dropped_in_words,
    load_in_words,
    noise,
    number,
    percent,
    size,
    spread_in_words,
    times,
    unchanged_in_words,
)
from ffsplit.store.manifest import CalibrationRecord, Latency, Manifest, Measurements

CARRIED: Final = (
    "language",
    "license",
    "license_name",
    "license_link",
    "library_name",
    "pipeline_tag",
    "datasets",
)
"""Fields of the original's card that hold for the compressed model too."""
LEFT_FORMATS: Final = frozenset(
    ("coreml", "flax", "gguf", "jax", "keras", "mlx", "onnx", "openvino", "pytorch", "rust", "tf", "tflite")
)
"""Tags that name formats of weights which no artifact has."""
OWN_TAGS: Final = ("ffsplit", "compressed")
BUILTIN_TEXT: Final = {
    "builtin:text": "everyday sentences and Python's documentation",
    "builtin:pydoc": "Python's documentation",
}
_HUB_DATASET: Final = re.compile(r"hf:(?://)?([\w.-]+(?:/[\w.-]+)?)[:#@].*")
GENERATORS: Final = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def model_card(manifest: Manifest, *, original: SourceCard) -> str:
    """The artifact's README.md: what it is and was made from, how to load it, its figures, its limits."""
    assert manifest.measurements is not None, "no model is published unmeasured"
    front = yaml.safe_dump(front_matter(manifest, original), sort_keys=False, allow_unicode=True, width=1000)
    parts = [
        f"# {manifest.model.id}, compressed with FFSplit",
        f"The feed-forward networks keep {manifest.keep:.4g} of their elements (recipe "
        f"`{manifest.recipe['name']}`: {manifest.recipe['description']})",
        *_changes(manifest),
        "## Load it",
        "An ordinary checkpoint: it loads without ffsplit."
        if manifest.plain
        else "It needs ffsplit: without `import ffsplit` the load fails.",
        f"```python\n{loading_code(manifest)}\n```",
        "## Measured",
        *_measured(manifest, manifest.measurements),
        "## Intended use and limits",
        *_limits(manifest, original),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def front_matter(manifest: Manifest, original: SourceCard) -> dict[str, Any]:
    """What a hub searches by. `base_model` only if the original is a hub id: a hub would link to it."""
    library = "sentence-transformers" if _is_encoder(manifest) else "transformers"
    fields: dict[str, Any] = {"license": manifest.model.license} if manifest.model.license else {}
    fields |= {"library_name": library}
    for name in CARRIED:
        if values := original.strings(name):
            fields[name] = list(values) if isinstance(original.fields[name], list) else values[0]
    if manifest.model.revision is not None:
        fields["base_model"] = manifest.model.id
        fields["base_model_relation"] = "quantized" if _is_quantized(manifest) else "finetune"
    given = [tag for tag in original.strings("tags") if tag.lower() not in LEFT_FORMATS]
    return fields | {"tags": list(dict.fromkeys((*given, *OWN_TAGS)))}


def _is_quantized(manifest: Manifest) -> bool:
    """Whether weights are integers. A hub knows no word for fewer neurons, which are refitted: finetune."""
    parts = (part for layer in manifest.layers for part in layer.layout.parts)
    formats = (each for part in parts for each in (part.up, part.gate, part.down))
    return manifest.linears is not None or any(isinstance(each, Integer) for each in formats)


def _is_encoder(manifest: Manifest) -> bool:
    """Whether it is a folder of sentence-transformers."""
    return _has(manifest, "modules.json")


def _has(manifest: Manifest, *names: str) -> bool:
    return any(entry.path in names for entry in manifest.files)


# How it is loaded


def loading_line(manifest: Manifest, place: str) -> str:
    """One line of Python that loads the artifact from a directory or an s3:// URI as `model`."""
    shown = json.dumps(place, ensure_ascii=False)
    if "://" in place:
        return f"import ffsplit; model = ffsplit.load({shown}{_trusting(manifest)})"
    needed = [] if manifest.plain else ["import ffsplit"]
    module, loader = _loader(manifest)
    return "; ".join(
        (*needed, f"from {module} import {loader[0]}", f"model = {loader[1]}({shown}{_trusting(manifest)})")
    )


def _loader(manifest: Manifest) -> tuple[str, tuple[str, str]]:
    """The module, what to import from it, and what to call."""
    if _is_encoder(manifest):
        return "sentence_transformers", ("SentenceTransformer", "SentenceTransformer")
    name = manifest.model.loading_class
    return "transformers", (name, f"{name}.from_pretrained")


def _trusting(manifest: Manifest) -> str:
    return ", trust_remote_code=True" if manifest.compute.trust_remote_code else ""


def loading_code(manifest: Manifest) -> str:
    """Python that loads the artifact and runs it on a text. It runs in the directory of the card."""
    module, (name, call) = _loader(manifest)
    reader = None if _is_encoder(manifest) else _reader(manifest)
    runs = list(_running(manifest, reader))
    imported = ", ".join(sorted(filter(None, (name, reader))))
    needed = ["import ffsplit  # teaches transformers the format"] if not manifest.plain else []
    needed += ["import torch"] if any("torch." in line for line in runs) else []
    code = [*needed, f"from {module} import {imported}", ""]
    code += ['directory = "."  # the directory of this card; on a hub, the id of this model']
    code += [f"model = {call}(directory{_trusting(manifest)})"]
    if reader is not None:
        variable = "tokenizer" if reader == "AutoTokenizer" else "processor"
        code += [f"{variable} = {reader}.from_pretrained(directory{_trusting(manifest)})"]
    return "\n".join([*code, *runs])


def _reader(manifest: Manifest) -> str | None:
    """The class that makes the model's inputs; None if the folder has none."""
    if _has(manifest, "preprocessor_config.json", "processor_config.json"):
        return "AutoProcessor"
    return "AutoTokenizer" if _has(manifest, "tokenizer.json", "tokenizer_config.json") else None


def _running(manifest: Manifest, reader: str | None) -> Iterator[str]:
    """Lines that run the model on a text; none if it reads other data, or an unknown arrangement of it."""
    loads = manifest.model.loading_class
    if _is_encoder(manifest):
        yield 'print(model.encode(["A first sentence.", "Another one."]).shape)'
    elif reader == "AutoTokenizer" and loads in GENERATORS:
        yield 'inputs = tokenizer("The first", return_tensors="pt")'
        yield 'given = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 20}'
        yield 'tokens = model.generate(inputs["input_ids"], **given)'
        yield "print(tokenizer.decode(tokens[0], skip_special_tokens=True))"
    elif reader == "AutoTokenizer" and all(layer.name.startswith("layer ") for layer in manifest.layers):
        yield 'inputs = tokenizer("A first sentence.", return_tensors="pt")'
        yield "with torch.no_grad():"
        yield "    outputs = model(**inputs)"
        if loads == "AutoModelForSequenceClassification":
            yield "print(model.config.id2label[outputs.logits[0].argmax().item()])"
        else:
            yield "print(outputs[0].shape)"


# What was done and measured


def _changes(manifest: Manifest) -> Iterator[str]:
    """What was done to the model, one paragraph each."""
    model = manifest.model
    yield calibrated_in_words(manifest.calibration, heals=bool(manifest.recipe.get("healing")))
    yield unchanged_in_words(model.left_out_ffns, ffn_elements=model.shape.ffn_elements)
    if manifest.experts is not None:
        yield dropped_in_words(manifest.experts)
    if manifest.linears is not None:
        sizes = f"{manifest.linears.original_size_bytes:,} bytes became {manifest.linears.size_bytes:,}"
        yield f"The linear layers of attention have int8 weights: {sizes}."


def calibrated_in_words(calibration: CalibrationRecord, *, heals: bool = False) -> str:
    """The text that a model was calibrated (and healed) on, by name, and how much the model wrote itself."""
    done = "Calibrated and healed" if heals else "Calibrated"
    tokens = f"{done} on {count(calibration.num_tokens)} tokens"
    own = calibration.own_rows
    given = ", ".join(_named(each) for each in calibration.sources if not each.startswith("self:"))
    if not own:
        return f"{tokens} of {given}."
    if own == calibration.num_rows:
        return f"{tokens} that the original model wrote itself: no data was used."
    share = percent(own / calibration.num_rows)
    return f"{tokens}: {share} was written by the original model itself, the rest is from {given}."


def _named(source: str) -> str:
    """A source of text: what comes with FFSplit in words, a dataset of the hub as a link."""
    for builtin, words in BUILTIN_TEXT.items():
        if source.split(":")[:2] == builtin.split(":"):
            return f"{words} (`{source}`)"
    dataset = _HUB_DATASET.fullmatch(source)
    return (
        f"[{dataset[1]}](https://huggingface.co/datasets/{dataset[1]}) (`{source}`)"
        if dataset
        else f"`{source}`"
    )


def _measured(manifest: Manifest, measured: Measurements) -> Iterator[str]:
    """The table, where it was measured, and the gates that it passed."""
    before, after = measured.original_size, measured.compressed_size
    rows = ["| | original | compressed | |", "|---|---|---|---|"]
    rows += [f"| parameters | {before.num_parameters:,} | {after.num_parameters:,} | |"]
    rows += [f"| bytes | {before.file_bytes:,} | {after.file_bytes:,} | |"]
    rows += [_latency_row(each) for each in measured.latency]
    rows += [
        f"| {task.name}, {task.metric} | {task.original:.4f} | {task.compressed:.4f} | |"
        for task in measured.tasks
    ]
    rows += _fidelity_rows(measured.fidelity)
    yield "\n".join(rows)
    yield _hardware(manifest, measured)
    if disturbed := noise(measured.latency, measured.load):
        yield f"**{disturbed[0].upper()}{disturbed[1:]}.**"
    yield "\n".join(f"- {describe_result(result)}" for result in manifest.gates)


def _latency_row(each: Latency) -> str:
    """Both medians, their ratio, and how much single pairs vary."""
    before, after = (number(ms) for ms in (each.original_p50_ms, each.compressed_p50_ms))
    ratio = times(each.speedup) + (f" ({spread_in_words(each.spread)})" if each.spread else "")
    return f"| forward {each.batch_size} x {each.num_tokens}, p50 ms | {before} | {after} | {ratio} |"


def _fidelity_rows(fidelity: dict[str, float]) -> Iterator[str]:
    """One row per metric: of both models, or of how close the two are."""
    for name, value in fidelity.items():
        whose, _, metric = name.partition("_")
        other = fidelity.get(f"compressed_{metric}")
        if whose == "original" and other is not None:
            yield f"| {metric.replace('_', ' ')}, held-out text | {value:.5f} | {other:.5f} | |"
        elif whose != "compressed" or f"original_{metric}" not in fidelity:
            yield f"| {name.replace('_', ' ')}, between the two | | {value:.5f} | |"


def _hardware(manifest: Manifest, measured: Measurements) -> str:
    """The machine, the device and the versions that the figures were measured with, in one sentence."""
    found = measured.hardware or manifest.environment.hardware
    versions = manifest.environment.versions
    names = ("gpu", "processor") if measured.device.startswith("cuda") else ("processor",)
    machine = [str(found[name]) for name in names if name in found]
    machine += [f"{found['num_cpus']} CPUs"] if "num_cpus" in found else []
    machine += [f"{size(int(found['memory_bytes']))} of memory"] if "memory_bytes" in found else []
    threads = f"{measured.num_threads} thread{'' if measured.num_threads == 1 else 's'}"
    used = [measured.device, measured.dtype, threads]
    used += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    used += [] if measured.load is None else [load_in_words(measured.load)]
    return f"Measured on {', '.join(machine)}; {', '.join(used)}."


def _limits(manifest: Manifest, original: SourceCard) -> Iterator[str]:
    """What the original's card says about use and limits, and what compression adds."""
    yield (
        "The compressed model has the original's uses and limits. Its outputs differ from the original's, "
        "more so on text unlike its calibration text: score it on your task."
    )
    if _has(manifest, ORIGINAL_CARD):
        more = ", which says:" if original.sections else "."
        yield f"The original's card: [{ORIGINAL_CARD}]({ORIGINAL_CARD}){more}"
        yield from original.sections
    if left_out := manifest.model.left_out:
        listed = (f"- `{each.path}`: {each.reason}" for each in left_out)
        yield "\n".join(["## Left out", "", "These files of the original are not included:", "", *listed])
