"""The KL coefficient follows the KL by the published rule, through a resume too."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import KLController, WeightSync


def after_an_update(controller: KLController, coefficient: float, kl: float, responses: float) -> float:
    module = SimpleNamespace(algorithm=Algorithm(kl_coefficient=coefficient))
    logged: dict[str, float] = {}
    controller.on_update_end(
        SimpleNamespace(log=logged.__setitem__), module, {"kl/reference_per_response": kl, "responses": responses}
    )
    assert logged == {"kl_coefficient": module.algorithm.kl_coefficient}
    return module.algorithm.kl_coefficient


@given(
    target=st.floats(1e-3, 100),
    kl=st.floats(-10, 1e4),
    horizon=st.integers(100, 10_000),
    responses=st.integers(0, 100),
    coefficient=st.floats(1e-6, 10),
)
def test_a_step_multiplies_the_coefficient_by_the_clipped_relative_error(
    target: float, kl: float, horizon: int, responses: int, coefficient: float
) -> None:
    error = kl / target - 1
    error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
    wanted = coefficient * (1 + error * responses / horizon)
    got = after_an_update(KLController(target, horizon), coefficient, kl, responses)
    assert got == pytest.approx(wanted, rel=1e-12) and got > 0


def test_the_rule_at_hand_computed_points() -> None:
    # Ziegler et al. 2019, section 2.2: K_beta = 0.1, e clipped at 0.2.
    assert after_an_update(KLController(6.0, 10_000), 0.2, 6.6, 512) == pytest.approx(0.2 * (1 + 0.1 * 0.0512))
    assert after_an_update(KLController(6.0, 10_000), 0.2, 60.0, 512) == pytest.approx(0.2 * (1 + 0.2 * 0.0512))
    assert after_an_update(KLController(6.0, 10_000), 0.2, 6.0, 512) == pytest.approx(0.2)
    assert after_an_update(KLController(6.0, 10_000), 0.2, -1.0, 512) == pytest.approx(0.2 * (1 - 0.2 * 0.0512))


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_leaves_the_coefficient(kl: float) -> None:
    assert after_an_update(KLController(1.0), 0.3, kl, 64) == 0.3


def test_in_a_run_every_update_follows_the_rule_and_the_loss_uses_it(inputs: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, float, float]] = []

    class Watch(RFTCallback):
        def on_update_end(self, trainer: Any, pl_module: Any, outputs: dict[str, float]) -> None:
            # Listed before the controller: the coefficient is still the one of this update's loss.
            loss = outputs["policy_loss"] + pl_module.algorithm.kl_coefficient * outputs["kl_loss"]
            assert outputs["loss"] == pytest.approx(loss, abs=1e-6)
            seen.append(
                (outputs["kl/reference_per_response"], outputs["responses"], pl_module.algorithm.kl_coefficient)
            )

    controller = KLController(target=0.05, horizon=200)
    usual = [tiny_run.sampler(), WeightSync(), Watch(), controller]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual)
    coefficient = 0.05
    for kl, responses, used in seen:
        assert responses == 8 and used == pytest.approx(coefficient, rel=1e-12)
        coefficient *= 1 + min(max(kl / 0.05 - 1, -0.2), 0.2) * responses / 200
    assert len(seen) == 6 and coefficient != 0.05
    last = float(tiny_run.rows(trainer.log_dir)[3]["kl_coefficient"])
    assert trainer.model.algorithm.kl_coefficient == last == pytest.approx(coefficient)


def test_a_resumed_run_goes_on_with_the_adapted_coefficient(inputs: Path, tmp_path: Path) -> None:
    first = tiny_run.fit(inputs, tmp_path, [tiny_run.checkpoints()], max_iterations=1)
    adapted = first.model.algorithm.kl_coefficient

    class Watch(RFTCallback):
        def on_iteration_start(self, trainer: Any, pl_module: Any) -> None:
            used.append(pl_module.algorithm.kl_coefficient)

    used: list[float] = []
    tiny_run.fit(inputs, tmp_path, [Watch()], max_iterations=2, ckpt_path="last")
    assert used == [adapted] and adapted != 0.05


def test_without_a_kl_it_is_refused_before_training(inputs: Path, tmp_path: Path) -> None:
    model = tiny_run.module(inputs, algorithm=Algorithm(kl="none"))
    usual = [tiny_run.sampler(), WeightSync(), KLController(target=0.05)]
    with pytest.raises(ValueError, match=r"KLController has no effect: .*kl: none"):
        tiny_run.fit(inputs, tmp_path, usual=usual, model=model)


def test_a_horizon_shorter_than_an_update_is_refused_before_training(inputs: Path, tmp_path: Path) -> None:
    usual = [tiny_run.sampler(), WeightSync(), KLController(target=1.0, horizon=7)]
    with pytest.raises(ValueError, match=r"KLController\.horizon=7 is shorter than one update \(8 responses\)"):
        tiny_run.fit(inputs, tmp_path, usual=usual)


@pytest.mark.parametrize("numbers", [(0.0, 100), (-1.0, 100), (math.nan, 100), (math.inf, 100), (1.0, 0)])
def test_numbers_out_of_range_are_refused(numbers: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match="KLController needs"):
        KLController(*numbers)
