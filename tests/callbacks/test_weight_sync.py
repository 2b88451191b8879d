"""An engine that does not hold what was pushed stops the run before it samples, however small the missed step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import EngineSleepWake, StaleWeightsError, Validation, WeightSync
from lightrft.engines import TransformersEngine
from lightrft.trainer import RFTTrainer

Named = list[tuple[str, Tensor]]
VICTIM = "model.layers.1.self_attn.q_proj.weight"


class Faulty(TransformersEngine):
    """Takes the first weights whole; what of the later ones arrives is up to ``fault``."""

    def __init__(self, fault: Callable[[Named, dict[str, Tensor]], Named], dtype: Any = None) -> None:
        super().__init__(dtype)
        self.fault = fault

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        arriving = list(tensors)
        if self.weight_version >= 0:
            arriving = self.fault(arriving, dict(self._model.state_dict()))
        super().update_weights(arriving, version)


def skipped(pushed: Named, held: dict[str, Tensor]) -> Named:
    return []


def half_of_the_tensors(pushed: Named, held: dict[str, Tensor]) -> Named:
    return pushed[1::2]


def all_but_one_tensor(pushed: Named, held: dict[str, Tensor]) -> Named:
    return [(name, tensor) for name, tensor in pushed if name != VICTIM]


def half_of_one_tensor(pushed: Named, held: dict[str, Tensor]) -> Named:
    def cut(tensor: Tensor, old: Tensor) -> Tensor:
        return torch.cat([tensor[: len(tensor) // 2], old[len(old) // 2 :]])

    return [(name, cut(tensor, held[name]) if name == VICTIM else tensor) for name, tensor in pushed]


def one_element_off_by_one_bit(pushed: Named, held: dict[str, Tensor]) -> Named:
    def bent(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])[3, 5] ^= 1
        return tensor

    return [(name, bent(tensor) if name == VICTIM else tensor) for name, tensor in pushed]


def two_layers_swapped(pushed: Named, held: dict[str, Tensor]) -> Named:
    new = dict(pushed)
    swapped = {VICTIM: new[VICTIM.replace(".1.", ".0.")], VICTIM.replace(".1.", ".0."): new[VICTIM]}
    return [(name, swapped.get(name, tensor)) for name, tensor in pushed]


def run(inputs: Path, root: Path, engine: TransformersEngine, *callbacks: RFTCallback, lr: float = 1e-6) -> RFTTrainer:
    """One optimizer step an iteration, at a constant learning rate. The trainer comes back whether or not it failed."""
    usual = [tiny_run.sampler(engine), *(callbacks or [WeightSync()])]
    trainer = tiny_run.trainer(root, usual=usual, responses_per_update=16)
    trainer.fit(tiny_run.module(inputs, lr=lr, lr_scheduler=None), tiny_run.data(inputs))
    return trainer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (skipped, "model.embed_tokens.weight"),
        (half_of_the_tensors, "model.embed_tokens.weight"),
        (all_but_one_tensor, VICTIM),
        (half_of_one_tensor, VICTIM),
        (one_element_off_by_one_bit, VICTIM),
        (two_layers_swapped, VICTIM.replace(".1.", ".0.")),
    ],
)
def test_one_faulty_sync_after_a_step_of_1e_6_stops_the_run(
    inputs: Path, tmp_path: Path, fault: Any, first: str, dtype: str
) -> None:
    sampled: list[int] = []

    class Watch(RFTCallback):
        def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
            sampled.append(trainer.progress.weight_version)

    with pytest.raises(StaleWeightsError, match=f"first {re.escape(first)} ") as caught:
        run(inputs, tmp_path, Faulty(fault, dtype), WeightSync(), Watch())
    assert sampled == [0]  # the step's weights are version 1, and nothing was sampled with them
    difference = re.search(r"the projections differ by ([\d.e+-]+)\)", str(caught.value))
    assert difference is not None and 0 < float(difference[1]) < 1


def test_the_difference_named_is_the_one_measured(inputs: Path, tmp_path: Path) -> None:
    def shifted(pushed: Named, held: dict[str, Tensor]) -> Named:
        def shift(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            tensor[0, 0] += 4.0  # the projection weighs the first element with a constant
            return tensor

        return [(name, shift(tensor) if name == VICTIM else tensor) for name, tensor in pushed]

    from lightrft.ops import fingerprint

    unit = torch.zeros(32, 32)
    unit[0, 0] = 4.0
    with pytest.raises(StaleWeightsError) as caught:
        run(inputs, tmp_path, Faulty(shifted))
    difference = float(re.search(r"differ by ([\d.e+-]+)\)", str(caught.value))[1])  # type: ignore[index]
    assert difference == pytest.approx(abs(fingerprint(unit).projection), rel=1e-5)


def test_a_sound_engine_passes_in_either_dtype(inputs: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        trainer = run(inputs, tmp_path / dtype, TransformersEngine(dtype))  # type: ignore[arg-type]
        assert trainer.progress.iteration == 3
        mismatch = trainer.callback_metrics["weight_sync/mismatch_nats"]
        assert (mismatch < 1e-5) if dtype == "float32" else (1e-5 < mismatch < 0.05)


def test_without_the_probe_the_same_fault_passes_unseen(inputs: Path, tmp_path: Path) -> None:
    trainer = run(inputs, tmp_path, Faulty(skipped), WeightSync(probe=False))
    assert trainer.progress.iteration == 3 and trainer.progress.weight_version == 3
    assert "weight_sync/mismatch_nats" not in trainer.callback_metrics


def test_without_weight_sync_stale_weights_are_not_sampled(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleWeightsError, match=r"list lightrft\.callbacks\.WeightSync"):
        run(inputs, tmp_path, TransformersEngine(), EngineSleepWake())


def test_a_sync_that_does_not_reach_the_engine_is_refused_before_sampling(inputs: Path, tmp_path: Path) -> None:
    class Deaf(TransformersEngine):
        def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
            if version == 0:
                super().update_weights(tensors, version)

    with pytest.raises(StaleWeightsError, match=r"holds weight version 0, the trainer is at 1"):
        run(inputs, tmp_path, Deaf(), WeightSync(probe=False))


# Log-probs


class Off(TransformersEngine):
    """Scores other than its weights say, by ``off[n]`` nats at the n-th time and the last of them from then on."""

    def __init__(self, *off: float) -> None:
        super().__init__()
        self.off = list(off)

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        off = self.off.pop(0) if len(self.off) > 1 else self.off[0]
        return [values + off for values in super().score(sequences)]


def test_log_probs_that_drift_off_stop_the_run_although_the_weights_are_in_place(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleWeightsError, match=r"differ from the trainer's by 0\.1 nats .*tolerance 0\.001"):
        run(inputs, tmp_path, Off(0.0, 0.1))


def test_the_tolerance_is_four_times_the_first_mismatch(inputs: Path, tmp_path: Path) -> None:
    assert run(inputs, tmp_path / "within", Off(0.05, 0.19)).progress.iteration == 3
    with pytest.raises(StaleWeightsError, match=r"tolerance 0\.2\)"):
        run(inputs, tmp_path / "beyond", Off(0.05, 0.21))


def test_calibration_accepts_no_more_than_the_largest_mismatch(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleWeightsError, match=r"by 0\.6 nats .*tolerance 0\.5\)"):
        run(inputs, tmp_path, Off(0.6))
    with pytest.raises(StaleWeightsError, match="nan nats"):
        run(inputs, tmp_path, Off(float("nan")))


def test_the_calibration_survives_a_resume(inputs: Path, tmp_path: Path) -> None:
    first = tiny_run.fit(inputs, tmp_path, [tiny_run.checkpoints()], max_iterations=1)
    assert first.checkpoint_callback is not None
    usual = [tiny_run.sampler(Off(0.1)), WeightSync()]
    with pytest.raises(StaleWeightsError, match=r"tolerance 0\.001"):
        tiny_run.fit(inputs, tmp_path, usual=usual, ckpt_path=str(first.checkpoint_callback.last_checkpoint))


# Sleep


class Forgetful(TransformersEngine):
    """Says after deep sleep that it still holds what it dropped."""

    def sleep(self, level: int = 1) -> None:
        version = self.weight_version
        super().sleep(level)
        self.weight_version = version

    def wake(self, parts: Any = ("weights", "cache")) -> None:
        dropped = next(self._model.parameters()).numel() == 0
        super().wake(parts)
        if dropped and "weights" in parts:
            for parameter in self._model.parameters():  # rather than what happens to be in memory
                parameter.data.zero_()


def test_weights_lost_in_deep_sleep_are_seen_when_nothing_was_pushed_since(inputs: Path, tmp_path: Path) -> None:
    callbacks = [WeightSync(), EngineSleepWake(level=2), Validation()]
    with pytest.raises(StaleWeightsError, match="does not hold the weights of version 0"):
        run(inputs, tmp_path, Forgetful(), *callbacks)


def test_an_engine_that_calls_weights_current_that_were_never_pushed_is_pushed_to(inputs: Path, tmp_path: Path) -> None:
    class Confident(TransformersEngine):
        def start(self, *args: Any) -> None:
            super().start(*args)
            self.weight_version = 0

    trainer, sound = (run(inputs, tmp_path / e.__name__, e(), lr=1e-2) for e in (Confident, TransformersEngine))
    assert tiny_run.differences(tiny_run.weights(trainer), tiny_run.weights(sound)) == []


def test_deep_sleep_changes_no_weight(inputs: Path, tmp_path: Path) -> None:
    runs = [
        run(inputs, tmp_path / str(level), TransformersEngine(), WeightSync(), EngineSleepWake(level), lr=1e-2)  # type: ignore[arg-type]
        for level in (1, 2)
    ]
    assert tiny_run.differences(*map(tiny_run.weights, runs)) == []


# What would have no effect


def test_an_unknown_sleep_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level is 3"):
        EngineSleepWake(level=3)  # type: ignore[arg-type]
