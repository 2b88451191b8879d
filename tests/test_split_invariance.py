"""The gradient of an optimizer step is that of the undivided step, however it is cut: micro-batches, packing, ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer import tiny_run

SCRIPT = Path(__file__).with_name("gradient_cases.py")
TOLERANCE = {"32-true": 1e-6, "64-true": 1e-10}
CUTS = ("1 micro-batch", "2 micro-batches", "4 micro-batches", "uneven")
Gradients = dict[tuple[str, ...], torch.Tensor]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Gradients]:
    """By number of ranks, then by (precision, cut, layout, aggregation)."""
    folder = tiny_run.write_inputs(tmp_path_factory.mktemp("gradients"))
    launchers = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]}
    found = {}
    for ranks, launcher in launchers.items():
        out = folder / f"{ranks}.pt"
        command = [*launcher, str(SCRIPT), str(folder), str(out)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = torch.load(out)
    return found


def distance(
    gradients: dict[int, Gradients], ranks: int, key: tuple[str, ...], undivided: str = "1 micro-batch"
) -> float:
    """``||g - g0|| / ||g0||``, g0 the packed, undivided step on one rank."""
    whole = gradients[1][(key[0], undivided, "packed", key[3])]
    return float((gradients[ranks][key] - whole).norm() / whole.norm())


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_does_not_depend_on_the_cut(gradients: dict[int, Gradients], ranks: int, precision: str) -> None:
    cases = [key for key in gradients[ranks] if key[0] == precision and key[1] in CUTS]
    assert len(cases) == 4 * 2 * 4  # cuts x layouts x aggregations
    far = {key: distance(gradients, ranks, key) for key in cases}
    assert {key: gap for key, gap in far.items() if not gap <= TOLERANCE[precision]} == {}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_without_a_trained_token_changes_nothing(
    gradients: dict[int, Gradients], ranks: int, precision: str
) -> None:
    undivided = "half dropped, 1 micro-batch"
    cases = [key for key in gradients[ranks] if key[0] == precision and key[1].startswith("half dropped")]
    assert len(cases) == 2 * 4  # cuts x aggregations
    far = {key: distance(gradients, ranks, key, undivided) for key in cases}
    assert {key: gap for key, gap in far.items() if not gap <= TOLERANCE[precision]} == {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_local_mean_would_be_seen(gradients: dict[int, Gradients], ranks: int) -> None:
    wrong = [key for key in gradients[ranks] if key[1] == "local means"]
    assert wrong and all(distance(gradients, ranks, key) > 0.1 for key in wrong)


def test_the_gradients_are_worth_comparing(gradients: dict[int, Gradients]) -> None:
    for gradient in gradients[1].values():
        assert torch.isfinite(gradient).all() and (gradient != 0).float().mean() > 0.5
