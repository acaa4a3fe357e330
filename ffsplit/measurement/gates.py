"""Gates: limits on measurements that a result must meet before it is published.

speedup >= 1.3                 at the slowest timed shape
speedup@8x128 >= 1.3           at 8 rows of 128 tokens, which is then timed
fidelity >= 0.98               pooled cosine of an encoder, top-1 agreement of a language model
pooled_cosine >= 0.98          any measure of fidelity by its name
sts drop <= 0.5                how much worse a task of --eval is, in the task's own unit
parameters reduction >= 20%    or of blocks (no embeddings, no heads), size, memory

A speed-up has a confidence interval. A gate whose limit lies inside it is neither met nor failed: it is
undecided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ffsplit.config import Record
from ffsplit.errors import ConfigError, did_you_mean
from ffsplit.keys import stage_key
from ffsplit.store.manifest import GateResult, Latency, Measurements, TaskScore

if TYPE_CHECKING:
    from ffsplit.config import JobConfig
    from ffsplit.models.checkpoint import Checkpoint
    from ffsplit.recipes.recipe import Recipe


Sense = Literal[">=", "<="]

LANGUAGE_FIDELITY: dict[str, Sense] = {
    "top1_agreement": ">=",
    "kl_divergence": "<=",
    "compressed_perplexity": "<=",
}
ENCODER_FIDELITY: dict[str, Sense] = {"pooled_cosine": ">=", "token_cosine": ">="}
"""What is measured, the headline first, and which direction is better."""
CLASSIFIER_FIDELITY: dict[str, Sense] = {
    **ENCODER_FIDELITY,
    "label_agreement": ">=",
    "logit_error": "<=",
}
FIDELITY: dict[str, Sense] = CLASSIFIER_FIDELITY | LANGUAGE_FIDELITY
QUIETER = (
    "timing noise could decide this: run on a quieter machine, or with a larger "
    "measurement.latency_pairs in a copy of the recipe"
)
"""Advice for a speed gate whose limit lies within the noise."""
HEADLINES = (next(iter(ENCODER_FIDELITY)), next(iter(LANGUAGE_FIDELITY)))
"""`fidelity` stands for whichever of these was measured."""
REDUCTIONS = ("parameters", "blocks", "size", "memory")
SHARES = ("top1_agreement", "label_agreement", "fidelity", *(f"{name} reduction" for name in REDUCTIONS))
"""Metrics that may be given in percent."""
FORMS = (
    "speedup >= F, speedup@8x128 >= F, fidelity >= F, pooled_cosine >= F, kl_divergence <= F, TASK drop <= F "
    "(TASK is sts, classification, perplexity, a file's name or a task of lm-eval, with :METRIC where it has "
    f"several) or {'|'.join(REDUCTIONS)} reduction >= F"
)

_SPEC = re.compile(r"(.+?)\s*(>=|<=|=>|=<|≥|≤)\s*([^%]+?)\s*(%?)", re.DOTALL)
_SENSES: dict[str, Sense] = {">=": ">=", "=>": ">=", "≥": ">=", "<=": "<=", "=<": "<=", "≤": "<="}
_SPEEDUP = re.compile(r"speedup(?:@(\d{1,6})[x×](\d{1,7}))?")  # noqa: RUF001


class Gate(Record):
    """One limit. `metric` is in the form of the module's examples."""

    metric: str
    sense: Sense
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sense} {self.limit:.12g}"

    @property
    def shape(self) -> tuple[int, int] | None:
        """The rows, and tokens per row, of a speed-up gate's shape; None for any other gate."""
        match = _SPEEDUP.fullmatch(self.metric)
        return (int(match[1]), int(match[2])) if match and match[1] else None

    @property
    def limits_speed(self) -> bool:
        return _SPEEDUP.fullmatch(self.metric) is not None

    @property
    def task(self) -> tuple[str, str] | None:
        """The task and the metric ("" for any) whose drop is limited; None for any other gate."""
        if not self.metric.endswith(" drop"):
            return None
        task, _, metric = self.metric.removesuffix(" drop").partition(":")
        return task, metric


def parse_gate(spec: str) -> Gate:
    """The gate of a SPEC. Raises ConfigError with the problem in one line."""
    if " ".join(spec.split()).endswith(" of current"):
        raise _error(spec, "only a zoo file with `promote` compares with the current result")
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise _error(spec, f"the forms are {FORMS}")
    metric, sense = _canonical(spec, " ".join(match[1].split())), _SENSES[match[2]]
    better = _better(metric)
    if sense != better:
        raise _error(
            spec, f"write {metric} {better} {match[3]}{match[4]}: the other direction lets bad results pass"
        )
    try:
        limit = float(match[3])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise _error(spec, f"{match[3]!r} is not a number")
    if match[4]:
        if metric not in SHARES:
            raise _error(spec, f"{metric} is not measured in percent")
        limit = float(f"{limit / 100:.12g}")
    return Gate(metric=metric, sense=sense, limit=limit)


def parse_gates(specs: Sequence[str], *, require_speedup: float | None = None) -> tuple[Gate, ...]:
    """The gates without duplicates, in a fixed order: how they were written does not matter."""
    gates = {parse_gate(spec) for spec in specs}
    if require_speedup is not None:
        gates.add(Gate(metric="speedup", sense=">=", limit=require_speedup))
    return tuple(sorted(gates, key=lambda gate: (gate.metric, gate.limit)))


def gated_key(work_key: str, gates: Sequence[Gate]) -> str:
    """The run key of a computation whose result must pass these gates."""
    if not gates:
        return work_key
    return stage_key("gated", {"work": work_key, "gates": [str(gate) for gate in gates]})


def check_gates(
    gates: Sequence[Gate],
    *,
    checkpoint: Checkpoint,
    recipe: Recipe,
    config: JobConfig,
) -> None:
    """Raise ConfigError for a gate on something that the run will not measure."""
    longest_row = checkpoint.max_positions
    kind, measured = _measured_of(checkpoint)
    for gate in gates:
        metric = gate.metric
        needs_whole = gate.task or gate.limits_speed or metric == "memory reduction"
        if needs_whole and config.block_by_block:
            raise _error(str(gate), "with --block-by-block only fidelity and size are measured")
        if metric in FIDELITY and metric not in measured:
            raise _error(str(gate), f"for {kind}, {', '.join(measured)} are measured")
        if metric == "memory reduction" and not recipe.measurement.peak_memory:
            raise _error(str(gate), "the recipe does not measure it (peak_memory: false)")
        if gate.shape and checkpoint.reads_jointly:
            raise _error(str(gate), "this model is timed on held-out rows, of any length: name no shape")
        if metric == "memory reduction" and checkpoint.reads_jointly:
            raise _error(str(gate), "the memory of a model that reads texts with a medium is not measured")
        if gate.shape and longest_row is not None and gate.shape[1] > longest_row:
            raise _error(str(gate), f"the model reads at most {longest_row} tokens per row")
        if gate.task and not any(_names_spec(gate.task[0], spec) for spec in config.eval):
            known = f": --eval has {', '.join(config.eval)}" if config.eval else ": --eval is not given"
            raise _error(str(gate), f"no --eval scores {gate.task[0]!r}{known}")


def _measured_of(checkpoint: Checkpoint) -> tuple[str, dict[str, Sense]]:
    """What a model is, in words, and which fidelity measures it has."""
    if checkpoint.compared_as in ("next_tokens", "target"):
        return "a language model", LANGUAGE_FIDELITY
    if checkpoint.classifies:
        return "a classifier", CLASSIFIER_FIDELITY
    return "an encoder", ENCODER_FIDELITY


def speed_limits(gates: Sequence[Gate]) -> tuple[tuple[tuple[int, int] | None, float], ...]:
    """The speed-ups that gates require: at one shape (rows, tokens per row), or None for every shape."""
    return tuple((gate.shape, gate.limit) for gate in gates if gate.limits_speed)


def judge(gates: Sequence[Gate], measured: Measurements) -> tuple[GateResult, ...]:
    """The result of each gate, with its figure. A gate on something not measured fails."""
    return tuple(
        _speed_result(gate, measured.latency) if gate.limits_speed else _result(gate, measured)
        for gate in gates
    )


def _result(gate: Gate, measured: Measurements) -> GateResult:
    figure = _figure(gate, measured)
    if figure is not None:  # 86.7 - 86.3 counts as 0.4, without the float error
        figure = float(f"{figure:.12g}") if math.isfinite(figure) else None
    met = figure is not None and (figure >= gate.limit if gate.sense == ">=" else figure <= gate.limit)
    return GateResult(gate=str(gate), figure=figure, met=met)


def _speed_result(gate: Gate, latency: Sequence[Latency]) -> GateResult:
    """The smallest speed-up over the gate's shapes, and its confidence interval."""
    timed = [each for each in latency if gate.shape in (None, (each.batch_size, each.num_tokens))]
    if not timed:
        return GateResult(gate=str(gate), figure=None, met=False)
    lows = [each.spread.low for each in timed if each.spread is not None and each.spread.low is not None]
    highs = [each.spread.high for each in timed if each.spread is not None and each.spread.high is not None]
    low = min(lows) if len(lows) == len(timed) else None
    high = min(highs) if len(highs) == len(timed) else None
    met = low is not None and low >= gate.limit
    failed = high is not None and high < gate.limit
    return GateResult(
        gate=str(gate),
        figure=min(each.speedup for each in timed),
        met=met,
        undecided=not (met or failed),
        low=low,
        high=high,
    )


def verdict(result: GateResult) -> str:
    """The result in a word or two."""
    if result.undecided:
        return "UNDECIDED"
    return "met" if result.met else "NOT met"


def describe_result(result: GateResult) -> str:
    """One line: the gate, its figure, and whether it is met."""
    figure = "not measured" if result.figure is None else f"{result.figure:.6g}"
    if result.low is not None and result.high is not None:
        figure += f" (99 % interval {result.low:.4g} to {result.high:.4g})"
    return f"gate {result.gate}: {figure}, {verdict(result)}"


def refusal(results: Sequence[GateResult]) -> str | None:
    """Why a result may not be published, in one line; None if every gate is met."""
    failed = [each for each in results if not each.met and not each.undecided]
    undecided = [each for each in results if each.undecided]
    counts = [
        f"{len(found)} of {len(results)} gates {what}"
        for found, what in ((failed, "not met"), (undecided, "undecided"))
        if found
    ]
    if not counts:
        return None
    shown = "; ".join(describe_result(each).removeprefix("gate ") for each in failed + undecided)
    hint = f": {QUIETER}" if undecided else ""
    return f"{', '.join(counts)}, nothing was published: {shown}{hint}"


def _error(spec: str, why: str) -> ConfigError:
    return ConfigError(f"--gate {spec!r}: {why}")


def _canonical(spec: str, metric: str) -> str:
    if match := _SPEEDUP.fullmatch(metric):
        if match[1] and 0 in (int(match[1]), int(match[2])):
            raise _error(spec, "a shape has at least one row and one token")
        return f"speedup@{int(match[1])}x{int(match[2])}" if match[1] else "speedup"
    first, _, last = metric.rpartition(" ")
    if last == "drop" and first:
        return metric
    known = ["speedup", "fidelity", *FIDELITY]
    known += [f"{name} reduction" for name in REDUCTIONS]
    if metric in known:
        return metric
    hint = did_you_mean(metric, known) or f": the forms are {FORMS}"
    raise _error(spec, f"{metric!r} is not measured{hint}")


def _better(metric: str) -> Sense:
    if metric.endswith(" drop"):
        return "<="
    return FIDELITY.get(metric, ">=")


def _names_spec(task: str, spec: str) -> bool:
    """Whether an --eval SPEC may give the scores that a gate calls `task`."""
    scheme, _, rest = spec.partition(":")
    file_name = rest.partition("#")[0].rstrip("/").rpartition("/")[2]
    return task in (scheme, spec, file_name) or (scheme == "lm-eval" and task in rest.split(","))


def names_score(task: str, score: TaskScore) -> bool:
    """Whether a score is one of what a gate calls `task`."""
    return task == score.name.partition(" ")[2] or _names_spec(task, score.spec)


def _figure(gate: Gate, measured: Measurements) -> float | None:
    metric = gate.metric
    if gate.task is not None:
        task, name = gate.task
        named = [score for score in measured.tasks if names_score(task, score)]
        by_name = [score for score in named if score.name.partition(" ")[2] == task] or named
        return max((_drop(score) for score in by_name if name in ("", score.metric)), default=None)
    if metric == "fidelity":
        return next((measured.fidelity[name] for name in HEADLINES if name in measured.fidelity), None)
    if metric.endswith(" reduction"):
        return _reduction(metric.removesuffix(" reduction"), measured)
    return measured.fidelity.get(metric)


def _drop(score: TaskScore) -> float:
    """How much worse, in the score's unit. If the better direction is unknown, any change counts."""
    lost = score.original - score.compressed
    if score.higher_is_better is None:
        return abs(lost)
    return lost if score.higher_is_better else -lost


def _reduction(name: str, measured: Measurements) -> float | None:
    before, after = measured.original_size, measured.compressed_size
    pairs: dict[str, tuple[int | None, int | None]] = {
        "parameters": (before.num_parameters, after.num_parameters),
        "blocks": (before.num_parameters_without_embeddings, after.num_parameters_without_embeddings),
        "size": (before.file_bytes, after.file_bytes),
        "memory": (measured.original_peak_memory_bytes, measured.compressed_peak_memory_bytes),
    }
    a, b = pairs[name]
    return (a - b) / a if a and b is not None else None
