"""One trainer fits, validates and fits again; runs keep apart; what cannot work is refused before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainer import tiny_run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_inputs(tmp_path_factory.mktemp("reuse"))


def test_a_trainer_validates_and_fits_again_after_a_fit(inputs: Path, tmp_path: Path) -> None:
    trainer, model, data = tiny_run.trainer(tmp_path, max_iterations=2), tiny_run.module(inputs), tiny_run.data(inputs)
    trainer.fit(model, data)
    trained = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert trainer.validate(model, data) == pytest.approx(trained)
    trainer.fit(model, data)
    assert trainer.progress.iteration == 2


def test_two_runs_without_a_logger_have_folders_of_their_own(inputs: Path, tmp_path: Path) -> None:
    for version in (0, 1):
        trainer = tiny_run.trainer(tmp_path, max_iterations=1, logger=[])
        trainer.fit(tiny_run.module(inputs), tiny_run.data(inputs))
        assert Path(trainer.log_dir) == tmp_path / f"version_{version}"


def test_a_prompt_that_the_context_has_no_room_for_is_named_before_training(inputs: Path, tmp_path: Path) -> None:
    records = [{"input": "1+1=", "label": "exact_match"}, {"input": "1" * 60, "label": "exact_match"}]
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    from lightrft.data import PromptData, Source

    trainer = tiny_run.trainer(tmp_path)
    with pytest.raises(ValueError, match=r"long/1.*60 tokens.*context leaves 59"):
        trainer.fit(tiny_run.module(inputs), PromptData(train=Source(str(source)), val=Source(str(source))))
    assert trainer.progress.iteration == 0


@pytest.mark.parametrize("precision", ["16-true", "8"])
def test_a_precision_that_the_loop_cannot_keep_safe_is_refused(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ValueError, match=rf"precision='{precision}' is not supported under DDP; use one of 64-true"):
        tiny_run.trainer(tmp_path, precision=precision)


def test_bf16_mixed_trains_with_an_engine_in_bf16(inputs: Path, tmp_path: Path) -> None:
    import torch

    trainer = tiny_run.trainer(tmp_path, max_iterations=1, precision="bf16-mixed")
    seen = []
    from lightrft.callback import RFTCallback

    class Look(RFTCallback):
        def on_engine_ready(self, trainer: object, pl_module: object) -> None:
            seen.append(trainer.rollout.engine.dtype)  # type: ignore[attr-defined]

    trainer.callbacks.append(Look())
    trainer.fit(tiny_run.module(inputs), tiny_run.data(inputs))
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.actor.parameters())
