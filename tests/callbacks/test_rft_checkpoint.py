"""Checkpoints: when they are written, that a run learns early where it could not save, and what a bad one says."""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from trainer import tiny_run

from lightrft import checkpoint
from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import RFTCheckpoint, WeightSync
from lightrft.checkpoint import manifest
from lightrft.trainer import RFTTrainer

Usage = namedtuple("Usage", "total used free")


def names(trainer: RFTTrainer) -> list[str]:
    return sorted(path.name for path in (Path(trainer.log_dir) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RFTTrainer:
    """A run of one iteration, saved at its end."""
    return tiny_run.fit(inputs, tmp_path_factory.mktemp("finished"), [tiny_run.checkpoints()], max_iterations=1)


@pytest.fixture
def saved(finished: RFTTrainer, tmp_path: Path) -> Path:
    """A copy of its checkpoint, to be damaged."""
    folder = finished.checkpoint_callback.last_checkpoint  # type: ignore[union-attr]
    return Path(shutil.copytree(folder, tmp_path / "saved"))  # type: ignore[arg-type]


# When


def test_every_n_iterations_and_after_the_last(inputs: Path, tmp_path: Path) -> None:
    options = {"every_n_iterations": 2, "max_keep": 9}
    trainer = tiny_run.fit(inputs, tmp_path, [RFTCheckpoint(**options)], max_iterations=5)  # type: ignore[arg-type]
    assert names(trainer) == ["iteration-000002", "iteration-000004", "iteration-000005"]


def test_at_update_saves_after_each_step_of_an_iteration_that_is_due(inputs: Path, tmp_path: Path) -> None:
    callback = RFTCheckpoint(every_n_iterations=2, at="update", max_keep=9)
    trainer = tiny_run.fit(inputs, tmp_path, [callback], max_iterations=3)
    second = ["iteration-000001-before-iteration-2", "iteration-000001-before-update-1"]
    assert names(trainer) == [*second, "iteration-000002", "iteration-000003"]


def test_at_phase_saves_at_every_boundary(inputs: Path, tmp_path: Path) -> None:
    callback = RFTCheckpoint(every_n_iterations=1, at="phase", max_keep=9)
    trainer = tiny_run.fit(inputs, tmp_path, [callback], max_iterations=1)
    between = ["advantages-0", "iteration-2", "score-0", "update-0", "update-1"]
    assert names(trainer) == [f"iteration-000000-before-{phase}" for phase in between] + ["iteration-000001"]


def test_the_newest_are_kept_and_those_of_an_earlier_run_left_alone(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "iteration-000000").mkdir(parents=True)
    callback = RFTCheckpoint(str(folder), every_n_iterations=1, max_keep=2)
    tiny_run.fit(inputs, tmp_path, [callback], max_iterations=4)
    assert sorted(path.name for path in folder.iterdir()) == [f"iteration-{n:06d}" for n in (0, 3, 4)]


def test_a_dry_run_writes_nothing(inputs: Path, tmp_path: Path) -> None:
    trainer = tiny_run.fit(inputs, tmp_path / "runs", [tiny_run.checkpoints(at="phase")], fast_dev_run=True)
    assert trainer.progress.iteration == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [{"every_n_iterations": 0}, {"max_keep": 0}, {"at": "epoch"}, {"mode": "least"}])
def test_values_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|at is 'epoch'|mode is 'least'"):
        RFTCheckpoint(**options)


# In the background


def test_the_loop_goes_on_while_a_checkpoint_is_written(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, seen = threading.Event(), []
    written = manifest.sums_of

    def slowly(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return written(*arguments)

    class Watch(RFTCallback):
        def on_update_end(self, trainer: Any, pl_module: Any, outputs: dict[str, float]) -> None:
            saving = trainer.checkpoint_callback
            if trainer.progress.iteration == 1:  # an optimizer step is done since the first was begun
                seen.append((saving.last_checkpoint, [path.name for path in saving._written]))
                go_on.set()

    monkeypatch.setattr(manifest, "sums_of", slowly)
    whole = tiny_run.fit(inputs, tmp_path / "whole", [Watch(), tiny_run.checkpoints(max_keep=9)])
    assert seen[0] == (None, ["iteration-000001"])
    assert names(whole) == ["iteration-000001", "iteration-000002", "iteration-000003"]
    # What was written is what was there when it was begun.
    first = Path(whole.log_dir) / "checkpoints" / "iteration-000001"
    resumed = tiny_run.fit(inputs, tmp_path / "resumed", ckpt_path=str(first))
    assert tiny_run.differences(tiny_run.weights(resumed), tiny_run.weights(whole)) == []


def _one_rank_fails(inputs: str, root: str, asynchronous: bool) -> list[str]:
    """What each rank says where the other's disk is full, and what is left."""
    if int(os.environ["RANK"]) == 1:
        opened = Path.open

        def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if path.name == "rank-1.pt" and "iteration-000002" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            return opened(path, mode, *args, **kwargs)

        Path.open = full  # type: ignore[method-assign]
    saving = tiny_run.checkpoints(dirpath=f"{root}/saved", asynchronous=asynchronous)
    with pytest.warns(UserWarning, match="iteration-000001"), pytest.raises(OSError) as caught:
        tiny_run.fit(Path(inputs), Path(root), [saving], devices=2)
    return [str(caught.value), *(path.name for path in Path(root, "saved").iterdir())]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_rank_that_cannot_write_stops_all(inputs: Path, tmp_path: Path, asynchronous: bool) -> None:
    (said, *left), (other, *_) = on_ranks(2, _one_rank_fails, str(inputs), str(tmp_path), asynchronous)
    assert said == other
    assert "iteration-000002 could not be written (rank 1: " in said and "No space left on device" in said
    assert left == ["iteration-000001"]


# The best


class Measure(RFTCallback):
    """Logs ``score``: one value an iteration; ``None`` logs nothing."""

    def __init__(self, *values: float | None) -> None:
        self.values = values

    def on_iteration_end(self, trainer: Any, pl_module: Any) -> None:
        value = self.values[trainer.progress.iteration - 1]
        if value is not None:
            trainer.log("score", value)


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", (0.1, 0.9, 0.9, 0.3, 0.2), 2),  # of equals the earlier
        ("min", (0.5, 0.1, 0.2, 0.3, 0.2), 2),
        ("max", (math.nan, 0.2, math.nan, math.nan, 0.1), 2),
        ("max", (-math.inf, -1.0, None, -2.0, -3.0), 2),
    ],
)
def test_the_best_is_kept_besides_the_newest(
    inputs: Path, tmp_path: Path, mode: Any, values: tuple[float | None, ...], best: int
) -> None:
    saving = tiny_run.checkpoints(monitor="score", mode=mode, max_keep=1)
    trainer = tiny_run.fit(inputs, tmp_path, [Measure(*values), saving], max_iterations=5)
    assert names(trainer) == ["best.json", f"iteration-{best:06d}", "iteration-000005"]
    assert checkpoint.find("best", [tmp_path]).name == f"iteration-{best:06d}"
    assert checkpoint.find("last", [tmp_path]).name == "iteration-000005"
    (tmp_path / "version_0").rename(tmp_path / "moved")  # a run's folder may move
    assert checkpoint.find("best", [tmp_path]).parent == tmp_path / "moved" / "checkpoints"


def test_a_resumed_run_still_knows_the_best(inputs: Path, tmp_path: Path) -> None:
    def fit(*values: float, **options: Any) -> RFTTrainer:
        saving = tiny_run.checkpoints(monitor="score", max_keep=1)
        return tiny_run.fit(inputs, tmp_path, [Measure(*values), saving], max_iterations=len(values), **options)

    first = fit(0.9, 0.1)
    second = fit(0, 0, 0.2, 0.3, ckpt_path="last")
    assert names(first) == ["best.json", "iteration-000001"]  # the resumed run's newest took the other's place
    assert names(second) == ["best.json", "iteration-000004"]
    assert checkpoint.find("best", [tmp_path]).resolve() == Path(first.log_dir) / "checkpoints" / "iteration-000001"
    third = fit(0, 0, 0, 0, 1.0, ckpt_path="last")
    assert names(third) == ["best.json", "iteration-000005"] and names(first) == ["best.json"]
    assert checkpoint.find("best", [tmp_path]).name == "iteration-000005"


def test_a_row_without_the_metric_is_told(inputs: Path, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"iteration-000001 does not compete .*no 'vall/reward'.*There are .*val/reward/mean"
    ):
        tiny_run.fit(inputs, tmp_path, [tiny_run.checkpoints(monitor="vall/reward")], max_iterations=1)
    with pytest.raises(ValueError, match="ckpt_path is 'best', but there is no checkpoint that was kept as the best"):
        tiny_run.fit(inputs, tmp_path, ckpt_path="best")


# Before training


class Begun(RFTCallback):
    def on_iteration_start(self, trainer: Any, pl_module: Any) -> None:
        raise AssertionError("training began")


@pytest.mark.parametrize("where", ["file/checkpoints", "/proc/self/fdinfo", "/proc/self/fdinfo/checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(inputs: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"RFTCheckpoint cannot write to .*set its dirpath to a writable folder"):
        tiny_run.fit(inputs, tmp_path, [RFTCheckpoint(str(tmp_path / where)), Begun()])


def test_a_disk_too_small_for_what_is_kept_is_refused_before_training(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: RFTTrainer
) -> None:
    written = tiny_run.saved_state(finished.checkpoint_callback.last_checkpoint)  # type: ignore[union-attr, arg-type]
    tensors = sum(value.nbytes for value in written.values() if isinstance(value, torch.Tensor))
    three = 3 * sum(p.numel() for p in finished.model.actor.parameters()) * 4 * 3
    assert three == pytest.approx(3 * tensors, rel=0.01)  # the estimate is of what is written
    for free, fits in ((three, True), (three - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(2**40, 0, free))
        if fits:
            tiny_run.fit(inputs, tmp_path, [RFTCheckpoint()], max_iterations=1)
            continue
        with pytest.raises(OSError, match=r"RFTCheckpoint needs .* GiB in .*max_keep=2.*free space, lower max_keep"):
            tiny_run.fit(inputs, tmp_path, [RFTCheckpoint(), Begun()], max_iterations=1)


# A disk that fills up


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """A real limit of this process: writing beyond it fails in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullDisk(RFTCheckpoint):
    """From the second checkpoint on, no file gets longer than a page or two."""

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        with files_no_longer_than(8192) if trainer.progress.iteration == 2 else nullcontext():
            super().on_phase_end(trainer, pl_module, phase)
            if self._writer is not None and self._writer._writing is not None:
                wait([self._writer._writing])  # the disk is full while it writes, and it is not asked how it went


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_to_resume_from(
    inputs: Path, tmp_path: Path, asynchronous: bool
) -> None:
    class Boundaries(RFTCallback):
        passed = 0

        def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
            self.passed += trainer.progress.iteration == 2

    passed = Boundaries()
    with (
        pytest.warns(UserWarning, match=r"The run failed \(OSError\).*resume with --ckpt_path .*iteration-000001\b"),
        pytest.raises(OSError, match=r"iteration-000002 could not be written \(.*\); earlier ones are intact"),
    ):
        tiny_run.fit(inputs, tmp_path, [FullDisk(every_n_iterations=1, asynchronous=asynchronous), passed])
    assert passed.passed == (2 if asynchronous else 1)  # the next boundary, or the same
    (folder,) = (tmp_path / "version_0" / "checkpoints").iterdir()  # nothing half-written is left
    assert folder.name == "iteration-000001" and checkpoint.find("last", [tmp_path]) == folder
    resumed = tiny_run.fit(inputs, tmp_path, ckpt_path="last")
    whole = tiny_run.fit(inputs, tmp_path / "whole")
    assert tiny_run.differences(tiny_run.weights(resumed), tiny_run.weights(whole)) == []


@pytest.mark.parametrize("failing", ["__0_0.distcp", "rank-0.pt", "config.json", "checkpoint.json", "mkdir"])
def test_no_space_left_at_any_file_says_so(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    opened, made = Path.open, Path.mkdir
    full = OSError(errno.ENOSPC, "No space left on device")

    def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.name == failing and "w" in mode and ".partial-" in str(path):
            raise full
        return opened(path, mode, *args, **kwargs)

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if failing == "mkdir" and path.name.startswith(".partial-"):
            raise full
        made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with (
        pytest.warns(UserWarning, match="none was written yet"),
        pytest.raises(OSError, match=r"iteration-000001 could not be written \(.*No space left on device\)"),
    ):
        tiny_run.fit(inputs, tmp_path, [tiny_run.checkpoints()], max_iterations=1)
    assert list((tmp_path / "version_0" / "checkpoints").iterdir()) == []


# Finding one


def test_last_is_the_newest_complete_one_of_all_runs(tmp_path: Path) -> None:
    ages = {"version_0/checkpoints/a": 1, "version_1/checkpoints/b": 2, "version_1/checkpoints/.partial-c": 3}
    for name, seconds in ages.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "checkpoint.json").touch()
        os.utime(tmp_path / name, (seconds, seconds))
    assert checkpoint.find("last", [tmp_path]).name == "b"
    os.utime(tmp_path / "version_0/checkpoints/a", (4, 4))
    assert checkpoint.find("last", [tmp_path]).name == "a"


def test_a_partial_folder_alone_is_none(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / ".partial-a").mkdir()
    (tmp_path / ".partial-a" / "checkpoint.json").touch()
    with pytest.raises(ValueError, match="ckpt_path is 'last', but there is no checkpoint under"):
        tiny_run.fit(inputs, tmp_path, ckpt_path="last")


def test_a_foreign_folder_is_refused_in_a_sentence(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer' is no checkpoint folder \(it has no checkpoint\.json\)"):
        tiny_run.fit(inputs, tmp_path, ckpt_path=str(inputs / "tokenizer"))


# Loading one


def resume(inputs: Path, root: Path, folder: Path, **options: Any) -> None:
    tiny_run.fit(inputs, root, [Begun()], ckpt_path=str(folder), **options)


FILES = ["__0_0.distcp", ".metadata", "rank-0.pt", "huggingface/tokenizer.json", "checkpoint.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 200, -1])
def test_a_file_that_was_cut_short_is_named(inputs: Path, tmp_path: Path, saved: Path, name: str, keep: int) -> None:
    whole = (saved / name).read_bytes().rstrip()
    (saved / name).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\); resume from another"):
        resume(inputs, tmp_path, saved)


def test_one_flipped_bit_of_a_weight_is_seen(inputs: Path, tmp_path: Path, saved: Path) -> None:
    file, name = saved / "__0_0.distcp", "model.language_model.model.embed_tokens.weight"
    content = bytearray(file.read_bytes())
    weight = tiny_run.saved_weights(saved)[name]
    content[content.index(weight.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    # What makes this check necessary: torch notices nothing.
    assert not torch.equal(tiny_run.saved_weights(saved)[name], weight)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged \(its content is not what was written\)"):
        resume(inputs, tmp_path, saved)


@pytest.mark.parametrize("name", FILES[:4])
def test_a_missing_file_is_a_sentence(inputs: Path, tmp_path: Path, saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*No such file"):
        resume(inputs, tmp_path, saved)


def test_another_model_is_refused_in_a_sentence(inputs: Path, tmp_path: Path, saved: Path) -> None:
    model = tiny_run.module(inputs, config=tiny_run.QWEN2 | {"hidden_size": 16})
    with pytest.raises(ValueError, match=r"do not fit this run's model and optimizer: .*size mismatch") as caught:
        resume(inputs, tmp_path, saved, model=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 1}, "seed=0, this run has 1"),
        ({"samples_per_prompt": 2}, "samples_per_prompt=4, this run has 2"),
        ({"prompts_per_iteration": 8}, "prompts_per_iteration=4, this run has 8"),
        ({"responses_per_update": 16}, "responses_per_update=8, this run has 16"),
        ({"epochs_per_iteration": 2}, "epochs_per_iteration=1, this run has 2"),
    ],
)
def test_another_seed_or_size_is_refused_in_a_sentence(
    inputs: Path, tmp_path: Path, saved: Path, options: dict[str, int], says: str
) -> None:
    with pytest.raises(ValueError, match=f"The checkpoint was written with {says}; set it back"):
        resume(inputs, tmp_path, saved, **options)


def test_an_optimizer_or_schedule_that_the_checkpoint_would_overrule_is_refused(
    inputs: Path, tmp_path: Path, saved: Path
) -> None:
    def schedule(steps: int) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps)

    for model, says in (
        (tiny_run.module(inputs, lr=1.0), r"optimizer\.lr=0\.001, this run has 0\.1"),
        (tiny_run.module(inputs, lr_scheduler=schedule(9)), r"lr_scheduler\.total_iters=3, this run has 9"),
        (tiny_run.module(inputs, lr_scheduler=None, lr=1e-3), r"lr_scheduler=LinearLR, this run has None"),
        (
            tiny_run.module(inputs, optimizer=lambda params: torch.optim.SGD(params, 1e-2)),
            "optimizer=AdamW, this run has SGD",
        ),
    ):
        with pytest.raises(ValueError, match=f"The checkpoint was written with {says}"):
            resume(inputs, tmp_path, saved, model=model)


def test_what_a_resume_may_change_takes_effect(inputs: Path, tmp_path: Path, saved: Path) -> None:
    model = tiny_run.module(inputs, algorithm=Algorithm(kl="none"))
    usual = [tiny_run.sampler(), WeightSync()]
    trainer = tiny_run.fit(
        inputs, tmp_path, usual=usual, model=model, ckpt_path=str(saved), max_iterations=2, gradient_clip_val=None
    )
    row = tiny_run.rows(trainer.log_dir)[2]
    assert "kl_loss" not in row and float(row["learning_rate"]) > 1e-3
