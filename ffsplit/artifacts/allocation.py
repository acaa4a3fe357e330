"""What a search over the layers' shares found, as the manifest records it."""

from __future__ import annotations

from pydantic import Field

from ffsplit.config import Record


class CandidateRecord(Record):
    """One way to share the budget out, judged end to end. `num_elements` are the layers'."""

    name: str
    num_elements: tuple[int, ...]
    score: float = Field(
        description="higher is better: minus the KL divergence, minus a classifier's logit error, or the "
        "mean of the cosines less 1"
    )
    fold_scores: tuple[float, ...] = Field(description="of parts of the rows; `score` is their mean")
    fidelity: dict[str, float] = Field(description="mean over the folds")


class AllocationRecord(Record):
    """A search over the layers' shares, judged on rows apart from calibration and held-out ones.

    The candidate was chosen where its distance from the original was clearly below the uniform layers' on
    every fold of the rows, and the uniform layers elsewhere.
    """

    chosen: str
    num_rows: int
    errors: tuple[float, ...] = Field(
        default=(), description="minus the score of the original with this FFN's block alone compressed"
    )
    candidates: tuple[CandidateRecord, ...]
