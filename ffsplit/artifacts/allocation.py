"""What a search over the layers' shares found, as the manifest records it."""

from __future__ import annotations

from pydantic import Field

from ffsplit.config import Record


class CandidateRecord(Record):
    """One way to share the budget out, judged end to end. `num_elements` are the layers'."""

    name: str
    num_elements: tuple[int, ...]
    score: float = Field(description="higher is better: minus the KL divergence, or the mean of both cosines")
    fold_scores: tuple[float, ...] = Field(description="of parts of the rows; `score` is their mean")
    fidelity: dict[str, float] = Field(description="mean over the folds")


class AllocationRecord(Record):
    """A search over the layers' shares, judged on rows apart from calibration and held-out ones.

    The best of those that beat the uniform layers on every fold of the rows was chosen, or uniform.
    """

    chosen: str
    num_rows: int
    candidates: tuple[CandidateRecord, ...]
