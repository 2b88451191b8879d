"""The gradient of a step is that of the undivided step, however it is cut: micro-batches, layout, ranks, the head.

Every algorithm and option of the grid (``docs/grid.md``), by a few cuts that between them change everything.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightrft.algorithms import PRESETS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gradient_cases import CUTS, HEADS, LAYOUTS, PRECISIONS, ROWS, SEEN, TOLERANCE, Measured, measure

RIGHT = [name for name, row in ROWS.items() if not row.wrong]
HALF = [name for name in RIGHT if "half dropped" in name]


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    return measure(few=True)


def of(measured: list[Measured], row: str) -> list[Measured]:
    return [one for one in measured if one.row == row]


@pytest.mark.parametrize("row", RIGHT)
def test_gradient_does_not_depend_on_the_cut(measured: list[Measured], row: str) -> None:
    steps = of(measured, row)
    assert {(one.precision, one.ranks) for one in steps} == {(precision, n) for precision in PRECISIONS for n in (1, 2)}
    far = {str(one): one.differences for one in steps if not one.difference <= TOLERANCE[one.precision]}
    assert far == {}


def test_every_preset_and_every_cut_is_tried(measured: list[Measured]) -> None:
    assert set(PRESETS) <= set(RIGHT)
    for attribute, values in {"cut": CUTS, "layout": LAYOUTS, "head": HEADS}.items():
        assert {getattr(one, attribute) for one in measured} == set(values)
    for row in RIGHT:
        models = {"actor", "critic"} if ROWS[row].preset == "ppo" else {"actor"}
        assert all(one.differences.keys() == models for one in of(measured, row))


def test_the_cuts_are_what_they_are_called(measured: list[Measured]) -> None:
    for one in of(measured, "grpo"):
        parts = [len(rank) for rank in one.micro_batches]
        assert sum(map(sum, one.micro_batches)) == 81
        assert one.cut == "uneven" or parts == [int(one.cut)] * one.ranks
    (uneven,) = (one for one in of(measured, "grpo") if one.cut == "uneven" and one.ranks == 2)
    assert len(uneven.micro_batches[0]) > 4 and len(set(uneven.micro_batches[0])) > 3


@pytest.mark.parametrize("row", HALF)
def test_a_rank_that_owns_no_trained_token_computes_those_of_another(measured: list[Measured], row: str) -> None:
    shared = [one for one in of(measured, row) if one.ranks == 2]
    assert shared and all(sum(one.micro_batches[1]) > 0 for one in shared)
    assert all(one.difference <= TOLERANCE[one.precision] for one in shared)


@pytest.mark.parametrize("row", [name for name in ROWS if name not in RIGHT])
def test_a_bug_would_be_seen(measured: list[Measured], row: str) -> None:
    # On one rank all statistics are those of the step.
    cut = [one for one in of(measured, row) if one.ranks == 2 or (one.cut != "1" and "means" in row)]
    assert cut and all(one.difference > SEEN for one in cut)


def test_the_gradients_are_worth_comparing(measured: list[Measured]) -> None:
    for one in measured:
        assert all(0.01 < norm < 100 for norm in one.norms.values()), str(one)
        assert all(share > 0.9 for share in one.nonzero.values()), str(one)
        assert 0 < one.clipped < 0.5 and one.metrics["skipped_updates"] == 0, str(one)


def test_the_options_are_at_work(measured: list[Measured]) -> None:
    """What an option leaves out or bounds is neither nothing nor all."""
    for row in RIGHT:
        metrics, axes = of(measured, row)[0].metrics, ROWS[row].algorithm().axes
        if axes.correction != "none":
            assert 0 < metrics["correction/bounded_fraction"] < 1, row
        if axes.top_entropy_fraction < 1:
            assert metrics["token_filter/kept_fraction"] == pytest.approx(0.5, abs=0.05), row
        fewer = axes.mask_truncated or axes.group_filter != "none" or row in HALF
        assert (metrics["tokens"] < 81) == fewer, row
    norms = {row: of(measured, row)[0].norms["actor"] for row in RIGHT}
    # The KL terms k2 and k3_k2 have one gradient; so have GSPO at its two levels.
    assert len({round(norm, 4) for norm in norms.values()}) >= len(norms) - 4
