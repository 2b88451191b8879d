"""Each silent failure of engines stops a run at the sync in which it happens, before anything is sampled with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import EngineSleepWake, StaleWeightsError, Validation, WeightSync
from lightrft.engines import Engine, TransformersEngine

from .faults import FAULTS, Around, Fault

# Makers of engines that read the tiny run's model.
ENGINES: dict[str, Callable[[], Engine]] = {
    "transformers, float32": lambda: TransformersEngine("float32"),
    "transformers, bfloat16": lambda: TransformersEngine("bfloat16"),
}


class Versions(RFTCallback):
    """Those that were sampled with."""

    def __init__(self) -> None:
        self.sampled: list[int] = []

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        self.sampled.append(trainer.progress.weight_version)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs: Path, root: Path, engine: Engine, fault: Fault, *callbacks: RFTCallback) -> None:
    """One optimizer step an iteration."""
    usual = [tiny_run.sampler(engine), WeightSync(), EngineSleepWake(fault.level), *callbacks]  # type: ignore[arg-type]
    trainer = tiny_run.trainer(root, usual=usual, responses_per_update=16)
    trainer.fit(tiny_run.module(inputs, lr=fault.step, lr_scheduler=None), tiny_run.data(inputs))


@pytest.mark.parametrize("make", ENGINES.values(), ids=list(ENGINES))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind.__name__)
def test_a_silent_failure_stops_the_run_before_it_samples(
    inputs: Path, tmp_path: Path, fault: Fault, make: Callable[[], Engine]
) -> None:
    versions = Versions()
    validation = [Validation()] if fault.resynced else []
    with pytest.raises(StaleWeightsError, match=fault.says):
        run(inputs, tmp_path, fault.kind(make()), fault, versions, *validation)
    # The step's weights are version 1; what is wrong with those of version 0 shows before any was taken.
    assert versions.sampled == ([0] if "version 1" in fault.says or "log-probs" in fault.says else [])


def test_an_engine_with_nothing_but_a_wrapper_around_it_passes(inputs: Path, tmp_path: Path) -> None:
    versions = Versions()
    run(inputs, tmp_path, Around(TransformersEngine()), Fault(Around, ""), versions)
    assert versions.sampled == [0, 1, 2]
