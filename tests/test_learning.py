"""Four presets of different kinds learn, one seed each; ``make learn`` runs all of them for three seeds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def learn() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import learn
    finally:
        sys.path.remove(str(BENCHMARKS))
    return learn


@pytest.fixture(scope="module")
def root(learn: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the supervised start."""
    folder = tmp_path_factory.mktemp("learn")
    learn.start(folder, steps=300)
    return folder


@pytest.mark.parametrize("preset", ["gspo", "dapo", "reinforce_plus_plus", "ppo"])
def test_held_out_accuracy_rises(learn: ModuleType, root: Path, preset: str) -> None:
    run = learn.measure(root, preset, seed=0, iterations=8)
    assert run["before"] < 0.5 and run["after"] - run["before"] >= learn.RISE, run
