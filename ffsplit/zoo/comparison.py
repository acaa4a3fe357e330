"""What differs between two results of one model: their figures, and what they were made from."""

from __future__ import annotations

from collections.abc import Mapping

from ffsplit.zoo.batch import Difference, Figures, ModelResult


def differences(before: Figures, after: Figures) -> tuple[Difference, ...]:
    """Size, speed-ups, fidelity and tasks that were measured for both."""
    found = [_of("size", "bytes", before.size_bytes[1], after.size_bytes[1])]
    found += [
        _of(f"speed-up at {shape}", "times", before.speedups[shape], speedup)
        for shape, speedup in after.speedups.items()
        if shape in before.speedups
    ]
    found += [
        _of(name.replace("_", " "), "fidelity", before.fidelity[name], value)
        for name, value in after.fidelity.items()
        if name in before.fidelity
    ]
    found += [
        _of(name.replace("_", " "), "score", before.tasks[name][1], scores[1])
        for name, scores in after.tasks.items()
        if name in before.tasks
    ]
    return tuple(found)


def _of(what: str, unit: str, before: float, after: float) -> Difference:
    return Difference.model_validate({"what": what, "unit": unit, "before": before, "after": after})


def reasons(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """Why a run has another key than an earlier one, from the digests of their inputs."""
    changed = [name for name, digest in after.items() if before.get(name) != digest]
    return tuple(f"new {name}" if not name.startswith("--") else f"{name} is given" for name in changed)


def what_changed(before: ModelResult, after: ModelResult) -> tuple[str, ...]:
    """Why a result is another one than that of an earlier batch; nothing if it is the same run."""
    if before.run_key == after.run_key:
        return ()
    found = reasons(before.inputs, after.inputs)
    if before.commit and after.commit and before.commit != after.commit:
        moved = f"new revision {short(after.commit)} (before: {short(before.commit)})"
        found = (moved, *(each for each in found if each != "new model"))
    return found or ("new version of FFSplit",)


def short(commit: str) -> str:
    """The beginning of a commit, as people write it."""
    return commit[:8]
