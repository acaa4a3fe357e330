"""Budgets of every kind: never exceeded, the next step would exceed, and the smallest is named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffsplit.compressors import DistillCompressor, LowRankCompressor, PruneCompressor, QuantizeCompressor
from ffsplit.config import Budget, BudgetKind
from ffsplit.errors import BudgetError, ConfigError
from ffsplit.ffn.shapes import FFNShape, LayerLayout, LowRank, ModelShape, is_stock_form
from ffsplit.splitting.latency import LatencyPoint, LatencyTable
from ffsplit.splitting.layer import HeavyRule, uniform_layouts
from ffsplit.splitting.solver import Solver, checked_multiple

MINILM = FFNShape(num_neurons=1536, hidden_size=384, gated=False, up_bias=True, down_bias=True)
MODEL = ModelShape(
    shapes=(MINILM,) * 6, itemsize=4, num_parameters=22_713_216, num_parameters_without_embeddings=10_646_784
)
TABLE = LatencyTable(
    model="m",
    model_shape=MODEL,
    batch_size=8,
    num_tokens=128,
    dtype="float32",
    num_threads=1,
    hardware={},
    points=(LatencyPoint(width=64, ms=20), LatencyPoint(width=768, ms=60), LatencyPoint(width=1536, ms=100)),
)
ALL, HALF = HeavyRule(by="share", value=1), HeavyRule(by="share", value=0.5)
PRUNE = Solver(model=MODEL, heavy=ALL, steps=(PruneCompressor(),), latency=TABLE)
PAPER = Solver(model=MODEL, heavy=HALF, steps=(LowRankCompressor(),))
INT8 = Solver(model=MODEL, heavy=ALL, steps=(PruneCompressor(),), finish=QuantizeCompressor())


KEEP = Budget(kind="keep", limit=1)


def dense(width: int) -> tuple[LayerLayout, ...]:
    return (LayerLayout.dense(MINILM, width),) * 6


def widths(layouts: tuple[LayerLayout, ...]) -> list[int]:
    return [layout.num_neurons for layout in layouts]


def wider(layouts: tuple[LayerLayout, ...]) -> tuple[LayerLayout, ...]:
    """With one more neuron in each layer."""
    return tuple(LayerLayout.dense(MINILM, each.num_neurons + 1) for each in layouts)


@settings(deadline=None, max_examples=60)
@given(limit=st.integers(300_000, 28_000_000), solver=st.sampled_from([PRUNE, PAPER]))
def test_bytes_are_never_exceeded(limit: int, solver: Solver) -> None:
    budget, one_step = Budget(kind="max_bytes", limit=limit), 6 * 4 * 2 * (1536 + 384)
    for each, given_up in (
        (solver.unrounded, 0.0),
        (solver, min(0.02 * MODEL.ffn_bytes, limit / 12)),
        (replace(solver, multiple=2), one_step),
    ):
        layouts = each.solve(budget)
        assert MODEL.bytes_of(layouts) <= limit
        assert limit - MODEL.bytes_of(layouts) < given_up + one_step or layouts == dense(1536)
        assert len(set(layouts)) == 1


LIMITS: list[tuple[BudgetKind, float]] = [
    ("max_bytes", 10_000_000),
    ("max_parameters", 18_000_000),
    ("max_latency_ms", 47.5),
]


@pytest.mark.parametrize(("kind", "limit"), LIMITS)
def test_the_next_width_would_exceed(kind: BudgetKind, limit: float) -> None:
    budget = Budget(kind=kind, limit=limit)
    layouts = PRUNE.unrounded.solve(budget)
    assert PRUNE.cost(budget, layouts) <= limit
    assert PRUNE.cost(budget, wider(layouts)) > limit


@pytest.mark.parametrize("multiple", [64, 96, 256, 1])
@pytest.mark.parametrize(("kind", "limit"), [("keep", 0.3535), *LIMITS])
def test_a_multiple_is_binding_for_every_kind_of_budget(
    kind: BudgetKind, limit: float, multiple: int
) -> None:
    budget, solver = Budget(kind=kind, limit=limit), replace(PRUNE, multiple=multiple)
    most = widths(PRUNE.unrounded.solve(budget))[0]
    assert solver.solve(budget) == dense(most // multiple * multiple)


@pytest.mark.parametrize("kind", ["max_bytes", "max_parameters"])
@pytest.mark.parametrize(
    ("most", "width"), [(542, 512), (543, 528), (767, 752), (542 + 64, 576), (1535, 1520), (30, 30)]
)
def test_every_kind_of_budget_is_rounded_alike(kind: BudgetKind, most: int, width: int) -> None:
    """A search over rounded widths would find 528 for 542: 543 is rounded to that, and it fits."""
    limit = PRUNE.cost(Budget(kind=kind, limit=1), dense(most))
    assert PRUNE.solve(Budget(kind=kind, limit=limit)) == dense(width)
    assert PRUNE.solve(Budget(kind="keep", limit=PRUNE.cost(KEEP, dense(most)))) == dense(width)


def test_a_multiple_holds_for_ranks_too() -> None:
    for multiple, heavy, rank in ((None, 256, 64), (1, 271, 62), (48, 240, 48), (17, 255, 51)):
        (layout, *_) = replace(PAPER, multiple=multiple).solve(Budget(kind="keep", limit=0.3535))
        assert layout.heavy is not None and layout.heavy.num_neurons == heavy
        assert layout.light is not None and layout.light.up == LowRank(rank=rank)
        assert layout.num_neurons == 1536


def test_a_whole_ffn_is_narrowed_if_the_multiple_does_not_divide_it() -> None:
    budget = Budget(kind="keep", limit=1)
    assert replace(PRUNE, multiple=512).solve(budget) == dense(1536)
    assert replace(PRUNE, multiple=1000).solve(budget) == dense(1000)
    assert replace(PRUNE, multiple=1000).solve(Budget(kind="max_bytes", limit=10**9)) == dense(1000)


@pytest.mark.parametrize("solver", [PRUNE, PAPER, replace(PRUNE, expert_share=0.0, heavy=HALF)])
def test_the_smallest_budget_with_a_multiple_is_named(solver: Solver) -> None:
    solver = replace(solver, multiple=256)
    for kind, limit in (("keep", 1e-6), ("max_bytes", 1), ("max_parameters", 1)):
        with pytest.raises(BudgetError, match="too small for widths and ranks in multiples of 256") as caught:
            solver.solve(Budget(kind=kind, limit=limit))  # type: ignore[arg-type]
        smallest = float(str(caught.value).rpartition(" ")[2])
        found = solver.solve(Budget(kind=kind, limit=smallest))  # type: ignore[arg-type]
        assert all(layout.heavy and layout.heavy.num_neurons == 256 for layout in found)


def test_a_multiple_that_no_budget_meets_is_one_line() -> None:
    with pytest.raises(BudgetError, match="make no FFN smaller in multiples of 1,536"):
        replace(PRUNE, multiple=1536).solve(Budget(kind="keep", limit=0.5))
    with pytest.raises(ConfigError, match=r"multiple 1537 .*give at most its 1,536 neurons"):
        checked_multiple(1537, model=MODEL)
    assert checked_multiple(1536, model=MODEL) == 1536 and checked_multiple(None, model=MODEL) is None


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3535, 0.2, 0.05, 1.0])
@pytest.mark.parametrize("kind", ["max_bytes", "max_parameters"])
def test_what_a_fraction_comes_to_resolves_to_the_same_layouts(keep: float, kind: BudgetKind) -> None:
    layouts = PRUNE.unrounded.solve(Budget(kind="keep", limit=keep))
    limit = PRUNE.cost(Budget(kind=kind, limit=1), layouts)
    assert PRUNE.unrounded.solve(Budget(kind=kind, limit=limit)) == layouts
    assert PRUNE.solve(Budget(kind=kind, limit=limit)) == PRUNE.solve(Budget(kind="keep", limit=keep))


def test_a_budget_beyond_the_original_is_the_original() -> None:
    for kind, limit in (("max_bytes", 10**9), ("max_parameters", 10**9), ("max_latency_ms", 1e6)):
        assert PRUNE.solve(Budget(kind=kind, limit=limit)) == dense(1536)


@pytest.mark.parametrize("kind", ["max_bytes", "max_parameters", "max_latency_ms"])
def test_the_error_names_the_smallest_that_works(kind: BudgetKind) -> None:
    with pytest.raises(BudgetError) as caught:
        PRUNE.solve(Budget(kind=kind, limit=1))
    found = re.search(r"smallest is ([\d.]+)$", str(caught.value))
    assert found and "--" + kind.replace("_", "-") in str(caught.value)
    smallest = float(found.group(1))
    assert PRUNE.solve(Budget(kind=kind, limit=smallest))
    with pytest.raises(BudgetError):
        PRUNE.solve(Budget(kind=kind, limit=smallest * (1 - 1e-6) - 1e-3))


def test_only_budgets_of_the_whole_model_name_its_rest() -> None:
    for kind, named in (("max_bytes", False), ("max_parameters", True), ("max_latency_ms", True)):
        with pytest.raises(BudgetError) as caught:
            PRUNE.solve(Budget(kind=kind, limit=1))
        assert ("the rest of the model" in str(caught.value)) == named


def test_bytes_are_those_of_what_a_recipe_ends_with() -> None:
    budget = Budget(kind="max_bytes", limit=5_000_000)
    layouts = INT8.solve(budget)
    assert 0.98 * budget.limit < INT8.cost(budget, layouts) <= budget.limit
    assert MODEL.bytes_of(INT8.stored(layouts)) == INT8.cost(budget, layouts)
    assert widths(layouts)[0] > 3.5 * widths(PRUNE.solve(budget))[0]
    assert all(layout.is_dense for layout in layouts), "until the recipe ends"
    assert INT8.solve(Budget(kind="keep", limit=0.3535)) == PRUNE.solve(Budget(kind="keep", limit=0.3535))


def test_parts_of_one_form_are_one_part_once_stored() -> None:
    solver = replace(INT8, heavy=HALF, steps=(DistillCompressor(part="light"),))
    layouts = solver.solve(Budget(kind="keep", limit=0.3535))
    assert all(layout.light is not None for layout in layouts)
    assert all(layout.light is None for layout in solver.stored(layouts))
    assert widths(solver.stored(layouts)) == widths(layouts)


@pytest.mark.parametrize("stored", ["factors", "integers"])
def test_a_latency_budget_is_for_narrower_ffns(stored: str) -> None:
    solver = replace({"factors": PAPER, "integers": INT8}[stored], latency=TABLE)
    with pytest.raises(BudgetError, match="narrower"):
        solver.solve(Budget(kind="max_latency_ms", limit=50))


@pytest.mark.parametrize(("kind", "limit"), [("keep", 0.3535), *LIMITS])
def test_a_profile_shares_the_same_budget_out_otherwise(kind: BudgetKind, limit: float) -> None:
    budget = Budget(kind=kind, limit=limit)
    layouts = PRUNE.solve(budget, profile=[0.5, 1, 1, 1, 1, 1.5])
    assert PRUNE.cost(budget, layouts) <= limit
    first, *middle, last = widths(layouts)
    assert first < middle[0] < last and len(set(middle)) == 1
    assert PRUNE.cost(budget, layouts) > 0.9 * limit


def test_a_saturated_layer_leaves_its_share_to_the_others() -> None:
    budget = Budget(kind="keep", limit=0.8)
    layouts = PRUNE.solve(budget, profile=[10, 1, 1, 1, 1, 1])
    assert widths(layouts)[0] == 1536
    assert 0.78 < PRUNE.cost(budget, layouts) <= 0.8


def test_heavy_hitters_by_energy_meet_budgets_in_bytes() -> None:
    solver = Solver(
        model=MODEL,
        heavy=HeavyRule(by="energy", value=0.9),
        steps=(LowRankCompressor(),),
        num_energetic=(5, 1, 40, 90, 300, 1400),
    )
    budget = Budget(kind="max_bytes", limit=8_000_000)
    layouts = solver.solve(budget)
    assert MODEL.bytes_of(layouts) <= 8_000_000
    heavy = [layout.heavy.num_neurons for layout in layouts if layout.heavy]
    assert heavy[:4] == [5, 1, 40, 88] and heavy[5] < 1400  # 90 is rounded
    exact = [layout.heavy.num_neurons for layout in solver.unrounded.solve(budget) if layout.heavy]
    assert exact[:4] == [5, 1, 40, 90] and exact[5] < 1400


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.31, 0.07])
def test_ffns_whose_widths_one_field_states_keep_one_fraction(keep: float) -> None:
    """A shared expert as wide as three experts: each alone would be rounded to another fraction."""
    expert = FFNShape(
        num_neurons=1408, hidden_size=64, gated=True, up_bias=False, down_bias=False, width_multiple=8
    )
    shared = expert.model_copy(update={"num_neurons": 3 * 1408, "width_multiple": 1})
    dense = expert.model_copy(update={"num_neurons": 1000, "width_multiple": 1})
    shapes = (expert, expert, shared, dense)
    model = MODEL.model_copy(update={"shapes": shapes, "width_groups": (0, 0, 0, 1)})
    found = Solver(model=model, heavy=HALF, steps=(PruneCompressor(),)).solve(Budget(kind="keep", limit=keep))
    first, second, third, other = widths(found)
    assert first == second and first % 8 == 0 and third == 3 * first
    alone = uniform_layouts(shapes, keep=keep, heavy=HALF, steps=(PruneCompressor(),))
    assert other == alone[3].num_neurons
    assert first == min(alone[0].num_neurons, alone[2].num_neurons // 3 // 8 * 8)
    assert is_stock_form(found, shapes, groups=model.width_groups)


def test_layouts_that_are_not_merely_narrower_keep_their_shares() -> None:
    shapes = (MINILM, MINILM.model_copy(update={"num_neurons": 3 * 1536}))
    model = MODEL.model_copy(update={"shapes": shapes, "width_groups": (0, 0)})
    found = Solver(model=model, heavy=HALF, steps=(LowRankCompressor(),)).solve(
        Budget(kind="keep", limit=0.31)
    )
    assert found == uniform_layouts(shapes, keep=0.31, heavy=HALF, steps=(LowRankCompressor(),))
