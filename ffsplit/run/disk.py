"""Upper estimates of a run's disk use in bytes: temporary files, the store, and caches of inputs.

Temporary files are those of the driver's host with all its workers, at the run's peak. The store holds the
run's scratch and, beside it, the artifact. The estimates err on the high side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ffsplit.calibration.sampling import FAN_IN, MAX_SAMPLED_SHARDS
from ffsplit.run.workload import Workload
from ffsplit.runtime.assemble import MAX_SHARD_BYTES

STATISTICS_ROW_BYTES = 72
"""One neuron in a Parquet file: seven 8-byte numbers, its index, and page overhead."""
DOCUMENT_BYTES = 400_000
"""The manifest, the card and the report. Each FFN adds `DOCUMENT_BYTES_AN_FFN`."""
DOCUMENT_BYTES_AN_FFN = 6_000
FILE_BYTES = 4096
"""Overhead per file: its record, its header, and the unused rest of its last block."""
SPARE_FILES = 16
SINGLE, LONG = 4, 8


@dataclass(frozen=True)
class Disk:
    """A run's files. `num_refits` is 0 if the layers are not refitted.

    `is_remote`: the store is not a file system, so stages download what they read.
    `is_spread`: other hosts work too, and fetch what the driver assembles from the store.
    """

    work: Workload
    workers: int
    num_refits: int
    is_streamed: bool
    is_remote: bool
    is_spread: bool

    @property
    def num_candidates(self) -> int:
        return 2 if self.work.recipe.allocation == "search" else 0

    @property
    def statistics(self) -> int:
        """One file of all layers."""
        neurons = sum(shape.num_neurons for shape in self.work.checkpoint.shapes)
        return FILE_BYTES + neurons * STATISTICS_ROW_BYTES

    @property
    def inputs(self) -> int:
        """The sampled inputs of every layer."""
        work = self.work
        num_files = min(work.num_shards, MAX_SAMPLED_SHARDS) * work.num_units
        of_token = work.shape.hidden_size * work.itemsize + work.experts_a_token * LONG
        return num_files * FILE_BYTES + work.sampled_tokens * of_token * work.num_units

    @property
    def layers(self) -> int:
        """The compressed layers of one pass over them."""
        return self.work.layer_bytes + self.work.num_ffns * FILE_BYTES

    @property
    def _measures_widths(self) -> bool:
        return self.work.recipe.allocation == "search" and self.work.measures_widths

    @property
    def widths(self) -> int:
        """The FFNs at all measured widths, and the records of two tables."""
        return self.work.width_bytes + 3 * self.work.num_ffns * FILE_BYTES

    @property
    def checkpoint(self) -> int:
        """The assembled checkpoint, with the tokenizer and the other files of the model's folder."""
        return self.work.compressed_bytes + self.work.companion_bytes + self._headers

    @property
    def artifact(self) -> int:
        return self.work.artifact_bytes + self.work.companion_bytes + self._headers + self.documents

    @property
    def documents(self) -> int:
        return DOCUMENT_BYTES + self.work.num_ffns * DOCUMENT_BYTES_AN_FFN + self.statistics

    @property
    def _headers(self) -> int:
        return 256 * len(self.work.checkpoint.tensors)

    def store_bytes(self) -> int:
        """The scratch of a whole run and the artifact: for a while both exist."""
        return self.scratch_of_statistics() + sum(self._scratch_of_model()) + self.artifact

    def store_bytes_of_statistics(self) -> int:
        return self.scratch_of_statistics() + self.documents

    def scratch_of_statistics(self) -> int:
        num_files, parts = self.work.num_shards, self.work.num_shards
        while parts > FAN_IN:
            parts = -(-parts // FAN_IN)
            num_files += parts
        return num_files * (self.statistics + FILE_BYTES) + self.inputs

    def _scratch_of_model(self) -> Iterator[int]:
        work = self.work
        yield max(1, self.num_candidates) * self.layers
        if self._measures_widths:
            yield self.layers + self.widths
        yield self.num_refits * (self.layers + self.inputs)
        if work.recipe.healing is not None:
            state = self._healing_state  # one stays until the next is written
            yield state + max(state, work.compressed_bytes)
        if work.recipe.after_healing is not None:
            samples_again = work.recipe.samples_again(work.layouts, work.checkpoint.shapes)
            yield self.layers + (self.inputs if samples_again else 0)
        if self.is_spread:
            yield sum(self._handed_over())

    @property
    def _healing_state(self) -> int:
        """The trained weights, the best so far, and the optimizer's two moments, in float32."""
        return 4 * SINGLE * self.work.trainable_elements

    def _handed_over(self) -> Iterator[int]:
        """What other hosts fetch: the model if they do not see it, and every intermediate checkpoint."""
        yield self._model
        yield (self.num_candidates + self.num_refits) * self.checkpoint
        yield self.checkpoint
        if self.work.recipe.after_healing is not None:
            yield self.artifact

    def cache_bytes(self, *, has_stored_model: bool) -> int:
        """Per host: a model from a store or, on a cluster, everything that hosts fetch from the scratch."""
        if self.is_spread:
            return sum(self._handed_over())
        return self._model if has_stored_model else 0

    @property
    def _model(self) -> int:
        """Every file in its folder, and the cache's own record of them."""
        return self.work.folder_bytes + SPARE_FILES * FILE_BYTES

    def temporary_bytes_of_statistics(self) -> int:
        return max(self._calibrating, self.documents + self.statistics)

    def temporary_bytes(self) -> int:
        """At the run's peak. What the driver downloads stays until it ends."""
        return max(self._calibrating, *self._moments())

    @property
    def _calibrating(self) -> int:
        """Each worker's shard on its way to the scratch, and hidden states that go from block to block."""
        work = self.work
        sampled_shards = min(work.num_shards, MAX_SAMPLED_SHARDS)
        of_shard = self.statistics + -(-self.inputs // sampled_shards)
        states = 2 * work.shard_tokens * work.shape.hidden_size * work.itemsize if self.is_streamed else 0
        return min(self.workers, work.num_shards) * (of_shard + states) + self.statistics

    def _moments(self) -> Iterator[int]:
        work, recipe = self.work, self.work.recipe
        num_passes = max(1, self.num_candidates)
        downloaded = num_passes * self.layers if self.is_remote else 0
        downloaded += self.layers if self.is_remote and self._measures_widths else 0
        fitting = self.workers * self._of_a_layer
        yield self.statistics + self.num_candidates * self.checkpoint + fitting + downloaded
        for _ in range(self.num_refits):
            yield self.statistics + self.checkpoint + max(fitting, self._calibrating) + downloaded
            downloaded += self.layers if self.is_remote else 0
        whole = self.statistics + self.checkpoint + downloaded
        if recipe.healing is not None:
            resumed = self._healing_state if self.is_remote else 0
            yield whole + resumed + max(self._healing_state, work.compressed_bytes)
            fetched = work.compressed_bytes if self.is_remote else 0
            whole += resumed + fetched
            yield whole + min(work.compressed_bytes, MAX_SHARD_BYTES)
        if recipe.after_healing is not None:
            whole += self.layers if self.is_remote else 0
            whole += work.other_block_elements * 11 // 10 if recipe.linears == "int8" else 0
            yield whole + fitting + self.artifact
        else:
            yield whole + self.documents

    @property
    def _of_a_layer(self) -> int:
        """One worker's layer on its way to the scratch, and the inputs it was fitted to, of both models."""
        of_inputs = (1 + bool(self.num_refits)) * self.inputs // self.work.num_units
        of_widths = self.widths // self.work.num_ffns if self._measures_widths else 0
        of_layer = max(-(-self.layers // self.work.num_ffns), of_widths)
        return of_layer + (of_inputs if self.is_remote else 0)
