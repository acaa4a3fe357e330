"""Puts a published result into use, unless it is worse than what is in use now."""

from __future__ import annotations

from ffsplit.errors import FFSplitError, StoreError, explained
from ffsplit.measurement.gates import refusal
from ffsplit.measurement.regressions import judge_regressions
from ffsplit.store.aliases import AliasChange, AliasMoved, history, promote, read_alias
from ffsplit.store.artifact import locate, read_manifest
from ffsplit.store.commits import read_commit
from ffsplit.store.manifest import Manifest
from ffsplit.store.store import MAX_ATTEMPTS, Store, open_store
from ffsplit.zoo.batch import Figures, Promotion
from ffsplit.zoo.comparison import differences
from ffsplit.zoo.zoo_file import ZooModel


def promote_result(model: ZooModel, run_key: str, *, alias: str, by: str) -> Promotion:
    """Compare a published run with the one that the alias names, and move the alias if no gate fails.

    If someone else moves the alias meanwhile, the run is compared with what it names then.
    A run that the alias has named before is left alone: someone moved the alias away from it. Never raises
    FFSplitError: what went wrong is in the record.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            with explained("the comparison failed"):  # whatever it is, other models go on
                return _promote(open_store(model.job.out), model, run_key, alias=alias, by=by)
        except FFSplitError as error:
            if not isinstance(error, AliasMoved) or attempt == MAX_ATTEMPTS:
                return Promotion(alias=alias, outcome="failed", error=str(error))
    raise AssertionError("unreachable")


def _promote(store: Store, model: ZooModel, run_key: str, *, alias: str, by: str) -> Promotion:
    seen = read_alias(store, alias)
    in_use = None if seen is None else seen.run_key
    if in_use == run_key:
        return Promotion(alias=alias, outcome="in use")
    commit = read_commit(store, run_key)
    if commit is None:
        raise StoreError(f"{store.uri}/{run_key} was removed meanwhile: the next batch computes it again")
    compared = Promotion(alias=alias, outcome="promoted", current=in_use)
    if in_use is not None:
        compared = _compared(compared, model, new=_read(store, run_key), current=_read(store, in_use))
    if _was_replaced(store, run_key, seen):
        return compared.model_copy(update={"outcome": "held"})
    if refusal(compared.gates) is not None:
        return compared.model_copy(update={"outcome": "refused"})
    promote(store, commit, alias=alias, by=by, over=seen)
    return compared


def _compared(promotion: Promotion, model: ZooModel, *, new: Manifest, current: Manifest) -> Promotion:
    """With the gates' results and the differences, as far as both runs were measured."""
    if new.measurements is None or current.measurements is None:
        return promotion
    gates = judge_regressions(model.regressions, new.measurements, current.measurements)
    found = differences(Figures.of(current.measurements), Figures.of(new.measurements))
    return promotion.model_copy(update={"gates": gates, "differences": found})


def _was_replaced(store: Store, run_key: str, seen: AliasChange | None) -> bool:
    return seen is not None and any(change.run_key == run_key for change in history(store, seen.alias))


def _read(store: Store, run_key: str) -> Manifest:
    return read_manifest(locate(f"{store.uri}/{run_key}"))
