"""The manifest: what an artifact is, where it came from, and its measurements. One JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from ffsplit.config import Budget, Record
from ffsplit.errors import ConfigError
from ffsplit.ffn.shapes import LayerLayout, ModelShape
from ffsplit.store.entries import MANIFEST_NAME, FileEntry, LeftOut, StoreGuarantees
from ffsplit.store.schema import Versioned, read_record
from ffsplit.store.store import open_store
from ffsplit.store.summary import Page, as_html, as_text

# The result of a search over the layers' shares of the budget, as the manifest records it.


class CandidateRecord(Record):
    """One distribution of the budget over layers, measured end to end. `num_elements` is per layer."""

    name: str
    num_elements: tuple[int, ...]
    score: float = Field(
        description="higher is better: minus the KL divergence, minus a classifier's logit error, or the "
        "mean of the cosines minus 1"
    )
    fold_scores: tuple[float, ...] = Field(
        description="one per fold of the rows, of which none mixes groups of rows; `score` is their mean"
    )
    fidelity: dict[str, float] = Field(description="mean over the folds")


class AllocationRecord(Record):
    """A search over the layers' shares, measured on rows that are neither calibration nor held-out rows.

    The candidate was chosen if it was clearly closer to the original than the uniform layers on every fold
    of the rows. Otherwise the uniform layers were chosen.
    """

    chosen: str
    num_rows: int
    errors: tuple[float, ...] = Field(
        default=(),
        description="per FFN: minus the score with only this FFN's block compressed; with tables of widths, "
        "with only this FFN at the measured width that is nearest to the uniform one",
    )
    candidates: tuple[CandidateRecord, ...]


REPORT_NAME = "report.html"
MAX_MANIFEST_BYTES = 64 << 20


class LeftOutFFNs(Record):
    """The FFNs of a tower that a run left as they were."""

    tower: str = Field(description="empty if the model has only one")
    num_ffns: int
    num_elements: int
    reason: str


class SourceModel(Record):
    """The model that was compressed."""

    id: str
    revision: str | None
    digest: str
    tokenizer_digest: str = Field(description="of every file except weights and documents")
    model_type: str
    architecture: str
    loading_class: str = Field(
        default="AutoModel", description="the class of transformers that loads it and its compressed form"
    )
    license: str | None
    shape: ModelShape = Field(description="from which `ffsplit plan` computes budgets")
    left_out: tuple[LeftOut, ...] = Field(
        default=(), description="files of its folder that were not copied, and why"
    )
    left_out_ffns: tuple[LeftOutFFNs, ...] = Field(default=(), description="FFNs that are unchanged, and why")


class CalibrationRecord(Record):
    """The text the statistics were collected on."""

    sources: tuple[str, ...]
    text_digest: str
    num_rows: int
    own_rows: int = Field(default=0, description="of these, written by the model itself")
    num_tokens: int
    max_length: int
    num_shards: int
    held_out_rows: int
    held_out_is_disjoint: bool = Field(
        description="False if the text was too short to separate held-out rows from calibration rows"
    )
    statistics_from: StatisticsOrigin | None = Field(
        default=None,
        description="set if an earlier run's statistics were reused; the text named above is then that run's",
    )


class StatisticsOrigin(Record):
    """The earlier run that the neuron statistics were taken from."""

    uri: str
    run_key: str
    attempt: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of its stats/neurons.parquet")
    sampled_text_digest: str = Field(
        description="of this run's rows; if it differs from the statistics' text_digest, the statistics "
        "may have been collected on some of the held-out rows"
    )


class LayerRecord(Record):
    """One compressed FFN: of a layer, or of one of its experts.

    `relative_error` is |z' - z| / |z| over the sampled FFN inputs, where z is what the next layer sees:
    the FFN's output y, or norm(x + y) in families that normalise after the FFN.
    """

    layer: int
    name: str = Field(description="as in `layer 3 expert 12`")
    layout: LayerLayout
    num_heavy_hitters: int
    num_elements: int
    size_bytes: int
    relative_error: float | None
    energy_in_top_5_percent: float | None
    neurons_for_energy: dict[str, int] | None = Field(
        default=None, description="percent of the output energy -> the fewest neurons that hold it"
    )
    num_tokens: int = Field(description="number of tokens that its statistics were collected on")
    by_weight_norm: bool = Field(
        default=False, description="scored by weight norms: an expert with too few tokens for statistics"
    )
    router_weighted_norm: float | None = Field(
        default=None,
        description="of an expert: mean over its tokens of the router's weight times the norm of its output",
    )


class DroppedExperts(Record):
    """The experts that a block lost."""

    block: str = Field(description="as in `layer 3`")
    experts: tuple[int, ...] = Field(description="their numbers in the original, from 0")


class ExpertsRecord(Record):
    """How many experts each block of a mixture had and has, and which were dropped."""

    num_experts: int
    num_kept: int
    dropped: tuple[DroppedExperts, ...]


class LinearsRecord(Record):
    """The linear layers of attention, if they have integer weights too."""

    modules: tuple[str, ...] = Field(description="paths below the base model")
    num_bits: Literal[8]
    num_elements: int
    size_bytes: int = Field(description="integers and scales")
    original_size_bytes: int


class Spread(Record):
    """The uncertainty of a measured speed-up. Ratios are original / compressed."""

    p10: float = Field(description="of the ratios of single pairs")
    p90: float
    low: float | None = Field(
        description="99 % confidence interval of the speed-up; None if there are too few pairs"
    )
    high: float | None

    def decides(self, limit: float) -> bool:
        """Whether the whole interval lies on one side of a limit. A speed-up equal to the limit meets it."""
        return self.low is not None and self.high is not None and (limit <= self.low or limit > self.high)


class LoadAverage(Record):
    """The machine's load average over one minute, just before and just after the timings."""

    before: float
    after: float
    num_cpus: int = Field(description="CPUs that this process may use")


class Latency(Record):
    """Forward passes at one shape, original and compressed in turn in one process."""

    batch_size: int
    num_tokens: int = Field(description="tokens per row")
    original_p50_ms: float
    original_p95_ms: float
    compressed_p50_ms: float
    compressed_p95_ms: float
    original_tokens_per_s: float
    compressed_tokens_per_s: float
    speedup: float = Field(description="original_p50_ms / compressed_p50_ms")
    spread: Spread | None = Field(default=None, description="of the speed-up")
    num_pairs: int


class Size(Record):
    """Parameters and bytes of a model."""

    num_parameters: int
    num_parameters_without_embeddings: int = Field(description="of the blocks: no embeddings, no heads")
    ffn_elements: int
    ffn_bytes: int
    file_bytes: int = Field(description="all safetensors files")


class TaskScore(Record):
    """One metric of one `--eval` task, for both models. Percentages are x 100, as papers print them."""

    name: str = Field(description="the task, and its file or its name in lm-eval")
    spec: str = Field(description="as it was given to --eval")
    metric: str
    higher_is_better: bool | None
    digest: str = Field(description="sha256 of the evaluation data as read")
    original: float
    compressed: float
    num_examples: int = Field(description="rows, or predicted tokens of running text")
    overlap_with_calibration: int = Field(
        description="distinct evaluation sentences that are in the calibration text too: 0 is a clean score"
    )


class BlockFidelity(Record):
    """How far the hidden states of the two models differ after a block, over the held-out tokens."""

    layer: int
    relative_error: float = Field(description="|h' - h| / |h|, Frobenius norms")
    cosine: float = Field(description="mean over tokens")


class Measurements(Record):
    """What was measured, and on what. Fidelity maps a metric's name to its value on held-out text."""

    original_size: Size
    compressed_size: Size
    fidelity: dict[str, float]
    latency: tuple[Latency, ...]
    load: LoadAverage | None = Field(default=None, description="None if nothing was timed")
    tasks: tuple[TaskScore, ...] = ()
    blocks: tuple[BlockFidelity, ...] = Field(
        default=(), description="only if the models were run one block at a time"
    )
    skipped: tuple[str, ...] = Field(default=(), description="what was not measured, and why")
    original_peak_memory_bytes: int | None
    compressed_peak_memory_bytes: int | None
    device: str
    dtype: str
    num_threads: int
    hardware: dict[str, str | int] = Field(
        default={}, description="of the host that measured: processor, num_cpus, memory_bytes and gpu"
    )
    seconds: dict[str, float] = Field(default={}, description="how long each part of the measurement took")


class GateResult(Record):
    """One gate of the run, and the figure that decided it."""

    gate: str = Field(description="as in `pooled_cosine >= 0.98`")
    figure: float | None = Field(description="None if it was not measured: the gate then fails")
    met: bool
    undecided: bool = Field(default=False, description="the limit lies within the noise of the timings")
    low: float | None = Field(default=None, description="of a speed-up: its 99 % confidence interval")
    high: float | None = None


class Stage(Record):
    """One stage of the run: its key, how many results it had, and how many of them were reused."""

    name: str
    key: str
    num_items: int
    num_reused: int
    wall_s: float
    cpu_s: float = Field(default=0.0, description="seconds of reserved CPU cores")
    gpu_s: float = Field(default=0.0, description="seconds of reserved GPUs")


class Environment(Record):
    """Where the run took place."""

    versions: dict[str, str]
    hardware: dict[str, str | int]


class Compute(Record):
    """The compute settings of each worker that can change the result's bytes."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    threads: int
    healing_threads: int | None = Field(default=None, description="None if nothing was healed")
    healing_workers: int | None = None
    attn_implementation: Literal["sdpa", "eager"] | None = Field(
        default=None, description="None if the model's config decided"
    )
    trust_remote_code: bool = Field(default=False, description="ran code that came with the model")


class Manifest(Versioned):
    """Everything a consumer may want to know about an artifact, with size and digest of every other file."""

    kind: Literal["model", "statistics"]
    run_key: str
    attempt: str
    created_at: str = Field(description="UTC, ISO 8601")
    ffsplit_version: str
    plain: bool | None = Field(description="loads with transformers alone; None for statistics")
    seed: int
    compute: Compute
    recipe: dict[str, Any] = Field(description="the recipe as resolved")
    keep: float | None = Field(description="elements of all FFNs, as a fraction of the original's")
    keep_unrounded: float | None = Field(
        default=None,
        description="what the budget allows uniform layers if widths and ranks are not rounded to multiples",
    )
    budget: Budget | None = Field(default=None, description="as given, or the recipe's keep")
    nonce: str | None = Field(default=None, description="set by --fresh, part of the run key")
    inputs: dict[str, str] = Field(
        default={}, description="digests of what the run key depends on: two runs differ where these do"
    )
    model: SourceModel
    calibration: CalibrationRecord
    layers: tuple[LayerRecord, ...]
    experts: ExpertsRecord | None = Field(default=None, description="None if no expert was dropped")
    allocation: AllocationRecord | None = Field(default=None, description="None if nothing was searched")
    linears: LinearsRecord | None = Field(default=None, description="None if attention is unchanged")
    measurements: Measurements | None
    gates: tuple[GateResult, ...] = Field(default=(), description="all met: otherwise nothing is published")
    stages: tuple[Stage, ...]
    environment: Environment
    store: StoreGuarantees | None = Field(default=None, description="of the store it was first published to")
    files: tuple[FileEntry, ...]
    _uri: str | None = PrivateAttr(default=None)

    @property
    def uri(self) -> str | None:
        """The directory that the artifact was published to or read from, or its s3:// URI.

        None if nothing was published. It is not part of the stored record.
        """
        return self._uri

    @property
    def path(self) -> Path | None:
        """The artifact's directory; None if it is in a bucket, or nothing was published."""
        return None if self._uri is None or "://" in self._uri else Path(self._uri)

    def load(self, **options: Any) -> Any:
        """The compressed model, as `ffsplit.load` gives it."""
        import ffsplit

        return ffsplit.load(self._published(), **options)

    def report(self) -> Page:
        """The HTML report. A notebook shows it."""
        return Page(open_store(self._published()).get_bytes(REPORT_NAME).decode("utf-8"))

    def _published(self) -> str:
        if self._uri is None:
            raise ConfigError(f"run {self.run_key} was not published: there is nothing to load or to show")
        return self._uri

    def __repr__(self) -> str:
        return as_text(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return as_html(self)

    def at(self, uri: str) -> Manifest:
        """This manifest as that of an artifact at a place."""
        placed = self.model_copy()
        placed._uri = uri
        return placed

    def listing(self, files: Iterable[FileEntry]) -> Manifest:
        """This manifest with these files, sorted by path. The later of two files with one path is kept."""
        listed = {entry.path: entry for entry in files}
        return self.model_copy(update={"files": tuple(listed[path] for path in sorted(listed))})

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse a manifest, including one of a later minor schema. Raises ArtifactError if it is invalid."""
        return read_record(cls, text, name=MANIFEST_NAME)


def manifest_schema() -> dict[str, Any]:
    """The manifest's JSON Schema. It allows unknown fields, since a later minor version may add some."""
    schema = Manifest.model_json_schema()
    for record in (schema, *schema["$defs"].values()):
        record.pop("additionalProperties", None) if record.get("properties") else None
    return schema


if __name__ == "__main__":
    print(json.dumps(manifest_schema(), indent=2, sort_keys=True))
