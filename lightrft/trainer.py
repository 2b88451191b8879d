"""RFTTrainer: reinforcement fine-tuning as a Fabric loop of named phases, with everything else in callbacks."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.loggers import CSVLogger, Logger
from lightning.fabric.strategies import Strategy
from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightrft import checkpoint
from lightrft.callback import (
    HOOKS,
    CheckpointCallback,
    Phase,
    RFTCallback,
    RolloutCallback,
    check_callbacks,
    the_one,
)
from lightrft.data import PromptData
from lightrft.interrupts import StopRequest
from lightrft.learner import Learner
from lightrft.module import RFTModule
from lightrft.random_state import random_state, set_random_state
from lightrft.refill import refill
from lightrft.samples import Batch, Prompt, Rollout, Sampling
from lightrft.scoring import Scoring
from lightrft.strategies import Roles, by_role, launch, leave_together, make_fabric
from lightrft.watchdog import Watchdog
from lightrft.whereabouts import mark

_NO_ROLLOUT = """trainer.callbacks needs exactly one rollout callback, for example:
  callbacks:
    - class_path: lightrft.callbacks.Rollout
      init_args:
        engine: {class_path: lightrft.engines.TransformersEngine}
    - class_path: lightrft.callbacks.WeightSync"""


@dataclasses.dataclass
class Progress:
    """Where a run stands: the next phase to run, and how often the weights changed."""

    iteration: int = 0
    phase: Phase = "rollout"
    update: int = 0
    weight_version: int = 0


class RFTTrainer:
    """Runs iterations of rollout, scoring, advantages and updates.

    Args:
        accelerator, devices, num_nodes: as for :class:`lightning.fabric.Fabric`.
        strategy: ``auto`` (one device, or ``ddp``), ``ddp``, ``fsdp2``, ``zero1``, ``zero2``, ``zero3``, the last four
            also with ``_offload``; or :class:`~lightrft.strategies.FSDP2`, :class:`~lightrft.strategies.ZeRO`. For
            models that take another, by ``default``, ``actor``, ``critic`` and ``reference``.
        precision: ``32-true``, ``bf16-mixed``, ``16-mixed``, ``64-true`` (``auto`` and ``ddp``) or ``bf16-true``; the
            last keeps no float32 weights, and rounds away steps as small as those of RL.
        callbacks: subclasses of :class:`~lightrft.callback.RFTCallback`; exactly one must be a ``RolloutCallback``.
        logger: where metrics go; ``None`` is a ``metrics.csv`` under ``default_root_dir``, an empty list is nowhere.
        default_root_dir: folder of the run's artefacts.
        max_iterations: iterations of the whole run, resumed parts included.
        prompts_per_iteration: prompts a rollout, over all ranks.
        samples_per_prompt: responses to each prompt: the group.
        responses_per_update: responses an optimizer step, over all ranks; ``None`` is the whole rollout.
        epochs_per_iteration: passes over a rollout.
        tokens_per_microbatch: most tokens (prompt and response) in one forward of one rank; accumulation follows.
        sequence_parallel_size: consecutive ranks that share the tokens of a micro-batch (DeepSpeed-Ulysses, arXiv
            2309.14509): for contexts that one rank has no memory for.
        gradient_clip_val: largest norm of the whole gradient; ``None`` does not clip.
        limit_val_prompts: validate on the first so many prompts; ``None`` is all.
        fast_dev_run: one iteration that writes nothing: does the configuration run?
        seed: of the whole run; ``None`` takes ``seed_everything``'s, else 0.
        timeout_seconds: how long a rank may go without progress (a token, a score, a micro-batch, a hook, a weight
            loaded into the engine) while it does not wait for one that has some; then all ranks end and say which one
            hung, in what. One that dies or fails alone ends them at once. From set-up to the last barrier; ``None`` is
            no watch. So set it above the longest single step: a model's loading, a checkpoint, a call of a reward.

    Raises:
        ValueError: sizes that do not divide, an unknown strategy, callbacks that do not fit; says what to set.
    """

    def __init__(
        self,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy | dict[str, str | Strategy] = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
        precision: str = "32-true",
        callbacks: list[RFTCallback] | None = None,
        logger: Logger | list[Logger] | None = None,
        default_root_dir: str = "runs",
        max_iterations: int = 100,
        prompts_per_iteration: int = 64,
        samples_per_prompt: int = 8,
        responses_per_update: int | None = None,
        epochs_per_iteration: int = 1,
        tokens_per_microbatch: int = 16384,
        sequence_parallel_size: int = 1,
        gradient_clip_val: float | None = 1.0,
        limit_val_prompts: int | None = None,
        fast_dev_run: bool = False,
        seed: int | None = None,
        timeout_seconds: float | None = 1800.0,
    ) -> None:
        default, self.own_strategies = by_role(strategy)
        self._watchdog = Watchdog(timeout_seconds)
        # Checkpoints last, as Lightning does: the others' state is then that of the boundary.
        self.callbacks = sorted(callbacks or [], key=lambda callback: isinstance(callback, CheckpointCallback))
        check_callbacks(self.callbacks)
        if the_one(self.callbacks, RolloutCallback) is None:
            raise ValueError(_NO_ROLLOUT)
        the_one(self.callbacks, CheckpointCallback)
        self.default_root_dir = Path(default_root_dir)
        self.max_iterations = 1 if fast_dev_run else max_iterations
        self.prompts_per_iteration = prompts_per_iteration
        self.samples_per_prompt = samples_per_prompt
        responses = prompts_per_iteration * samples_per_prompt
        self.responses_per_update = responses_per_update if responses_per_update is not None else responses
        self.epochs_per_iteration = epochs_per_iteration
        self.tokens_per_microbatch = tokens_per_microbatch
        self.sequence_parallel_size = sequence_parallel_size
        self.gradient_clip_val = gradient_clip_val
        self.limit_val_prompts = limit_val_prompts
        self.fast_dev_run = fast_dev_run
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._check_sizes()
        if logger is None:
            logger = CSVLogger(self.default_root_dir, name="", flush_logs_every_n_steps=1)
        loggers = [logger] if isinstance(logger, Logger) else logger
        self._devices: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
        self.fabric = make_fabric(default, str(precision), loggers=[] if fast_dev_run else loggers, **self._devices)
        self.precision = str(self.fabric.strategy.precision.precision)
        self._begin()

    def _begin(self) -> None:
        self.progress = Progress()
        self.callback_metrics: dict[str, float] = {}
        self._updates_of: dict[str, int] = {}
        self.should_stop = False
        self.samples: Rollout | None = None
        self.batch: Batch | None = None

    # --- what callbacks look up --------------------------------------------------------------------------------------

    @property
    def rollout(self) -> RolloutCallback:
        """The callback that generates."""
        return cast(RolloutCallback, the_one(self.callbacks, RolloutCallback))

    @property
    def checkpoint_callback(self) -> CheckpointCallback | None:
        """The callback that saves, if there is one."""
        return cast("CheckpointCallback | None", the_one(self.callbacks, CheckpointCallback))

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps an iteration."""
        responses = self.prompts_per_iteration * self.samples_per_prompt
        return responses // self.responses_per_update * self.epochs_per_iteration

    @property
    def shares_per_iteration(self) -> int:
        """Parts of a rollout that an optimizer step sees."""
        return self.updates_per_iteration // self.epochs_per_iteration

    @property
    def prompts_per_update(self) -> int:
        """Prompts whose groups an optimizer step sees, over all ranks."""
        return self.responses_per_update // self.samples_per_prompt

    @property
    def is_global_zero(self) -> bool:
        return self.fabric.is_global_zero

    @property
    def compute_dtype(self) -> torch.dtype:
        """What a forward computes in, which engines take for theirs."""
        dtypes = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64, "32": torch.float32}
        return dtypes[self.precision.partition("-")[0]]

    @property
    def strategy(self) -> Strategy:
        return self.fabric.strategy

    @property
    def loggers(self) -> list[Logger]:
        return self.fabric.loggers

    @property
    def log_dir(self) -> str:
        """Folder of this run's artefacts, the same on every rank; known from ``setup`` on."""
        return self._log_dir

    def _choose_log_dir(self) -> str:
        """A logger's folder, else the next free ``version_<n>``: two runs never share one."""
        own = next((logger.log_dir for logger in self.loggers if getattr(logger, "log_dir", None)), None)
        if own is not None or self.fast_dev_run:
            return str(own or self.default_root_dir)
        taken = [int(path.name[8:]) for path in self.default_root_dir.glob("version_*") if path.name[8:].isdigit()]
        return str(self.default_root_dir / f"version_{max(taken, default=-1) + 1}")

    def log(self, name: str, value: float) -> None:
        """Put a number (the same on every rank) into this iteration's row."""
        self.callback_metrics[name] = float(value)

    def call(self, hook: str, **arguments: Any) -> None:
        """Announce a moment to every callback, in the order of the list."""
        for method in self._listening(hook, **arguments):
            mark(getattr(method.func, "__qualname__", hook))
            method()
        mark("")

    def _listening(self, hook: str, **arguments: Any) -> list[partial[None]]:
        if hook not in HOOKS:
            raise AttributeError(f"{hook!r} is no hook of RFTCallback; declare it there first.")
        # Lightning's own callbacks (the CLI's SaveConfigCallback) do not declare our new hooks.
        methods = [getattr(callback, hook) for callback in self.callbacks if hasattr(callback, hook)]
        return [partial(method, trainer=self, pl_module=self.model, **arguments) for method in methods]

    # --- entry points ------------------------------------------------------------------------------------------------

    def fit(self, model: RFTModule, datamodule: PromptData, ckpt_path: str | None = None) -> None:
        """Train until ``max_iterations``.

        Args:
            model: joins actor, algorithm and rewards.
            datamodule: prompts.
            ckpt_path: a checkpoint folder to resume from exactly; ``last`` for the newest under
                ``default_root_dir``, or ``best`` for what was best by ``RFTCheckpoint.monitor``. Another number of
                ranks and another strategy may resume.

        Raises:
            ValueError: the configuration cannot work; raised before any training.
            SystemExit: stopped by SIGINT or SIGTERM, after a checkpoint at the next boundary.
        """
        with self._running(model, datamodule, "fit", ckpt_path), StopRequest() as stop:
            self._stop = stop
            self.call("on_fit_start")
            while self.progress.iteration < self.max_iterations and not self.should_stop:
                self._iteration()
            if not stop.signum:
                self.call("on_fit_end")
        if stop.signum:
            # A launcher ends all ranks when one of them fails: only the main one says how the run ended.
            raise SystemExit(128 + stop.signum if self.is_global_zero else 0)

    def validate(
        self,
        model: RFTModule,
        datamodule: PromptData,
        ckpt_path: str | None = None,
        samples_per_prompt: int = 1,
        temperature: float = 0.0,
    ) -> dict[str, float]:
        """Score responses to the validation prompts.

        Args:
            model, datamodule, ckpt_path: as in :meth:`fit`.
            samples_per_prompt: responses to each prompt.
            temperature: of their sampling; 0 is greedy.

        Returns:
            metrics, names beginning with ``val/``.

        Raises:
            ValueError: the configuration cannot work, or several greedy samples are asked for, which would be equal.
        """
        check_validation_sampling(samples_per_prompt, temperature)
        with self._running(model, datamodule, "validate", ckpt_path):
            self._watchdog.enter("validation", self.progress.iteration)
            metrics = self.evaluate(samples_per_prompt, temperature)
            self.fabric.log_dict(metrics, step=self.progress.iteration)
            for name, value in metrics.items():
                rank_zero_info(f"{name:40s} {value:.4f}")
        return metrics

    @contextmanager
    def _running(self, model: RFTModule, datamodule: PromptData, stage: str, ckpt_path: str | None) -> Iterator[None]:
        self.model, self.datamodule = model, datamodule
        self._begin()
        failure: BaseException | None = None
        try:
            self._set_up(stage, ckpt_path)
            self._watchdog.take_over()
            yield
            leave_together(self.fabric)
            self._watchdog.close()
        except BaseException as error:
            failure = error
            self._watchdog.failed(error)
            _try_all(self._listening("on_exception", exception=error))
            raise
        finally:
            status = "failed" if failure else "success"
            closing: list[Callable[[], Any]] = [model.scorer.close]
            closing += [partial(logger.finalize, status) for logger in self.loggers]
            closing += [self._watchdog.close]
            error_in_closing = _try_all([*self._listening("teardown", stage=stage), *closing])
            if error_in_closing and not failure:
                raise error_in_closing

    def _set_up(self, stage: str, ckpt_path: str | None) -> None:
        fabric = self.fabric
        launch(fabric)
        self._watchdog.start(fabric)
        fabric.seed_everything(self.seed, workers=True, verbose=False)
        rank_zero_info(self.sizes(fabric.world_size))
        roles = Roles(fabric, self.own_strategies, **self._devices)
        with roles.building():
            roles.default.together(self.model.configure_model)
        longest = self.model.context_tokens - self.rollout.sampling.max_new_tokens
        self.datamodule.attach(self.model.processor, self.seed, fabric.global_rank, fabric.world_size, longest)
        self.datamodule.setup(stage)
        self.model.check_labels(self.datamodule.labels(), complete=stage == "fit")
        if stage == "fit":
            self.model.check_group_size(self.samples_per_prompt)
            if not self.fast_dev_run:
                self.model.check_warmup(self.max_iterations)
        self.learner = Learner(
            fabric,
            roles,
            self.model,
            self.tokens_per_microbatch,
            self.gradient_clip_val,
            self.sequence_parallel_size,
        )
        if stage == "fit":
            self.prompts = self.datamodule.train_dataloader()
        for logger in self.loggers:
            getattr(logger, "experiment", None)  # a logger wants its folder before anything else writes there
        self._log_dir = fabric.broadcast(self._choose_log_dir())
        self.call("setup", stage=stage)
        if ckpt_path is not None:
            own = self.checkpoint_callback.dirpath if self.checkpoint_callback else None
            folder = checkpoint.find(ckpt_path, [self.default_root_dir, *([Path(own)] if own else [])])
            checkpoint.load(folder, self, weights_only=stage != "fit")
            if stage == "fit" and self.checkpoint_callback is not None:
                self.checkpoint_callback.last_checkpoint = folder
            rank_zero_info(f"Loaded {folder}")

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _iteration(self) -> None:
        """Run the phases that are still to be run in this iteration: all of them, unless a resume enters it midway."""
        progress = self.progress
        if progress.phase == "rollout":
            self.callback_metrics, self._updates_of = {}, {}
            self.call("on_iteration_start")
            self._phase("rollout", self._roll_out, then="score")
        if progress.phase == "score":
            self._phase("score", self._score, then="advantages")
        if progress.phase == "advantages":
            self._phase("advantages", self._prepare, then="update")
        while progress.phase == "update" and not self.should_stop:
            last = progress.update + 1 == self.updates_per_iteration
            self._phase("update", self._update, then="iteration" if last else "update")
        if progress.phase == "iteration":
            self._phase("iteration", self._end_iteration, then="rollout")

    def _phase(self, name: Phase, work: Any, then: Phase) -> None:
        if self.should_stop:
            return
        self._watchdog.enter(name, self.progress.iteration + 1)
        self.call("on_phase_start", phase=name)
        work()
        self.progress.phase = then
        self.call("on_phase_end", phase=name)
        self._stop_if_asked()

    def _roll_out(self) -> None:
        self.samples = self.sample(self.prompts_per_iteration)

    def sample(self, prompts: int) -> Rollout:
        """This rank's part of the responses to so many further prompts, not yet scored.

        With the greedy one where the algorithm wants it. A part is one block of every optimizer step's share.

        Args:
            prompts: over all ranks, whole optimizer steps of them.
        """
        drawn = self._draw(self.rollout.prompts_to_draw(prompts))
        self.call("on_rollout_start", prompts=drawn)
        with self._engine_awake():
            iteration = self.progress.iteration
            mark("sampling")
            rollout = self.rollout.sample(
                drawn, samples_per_prompt=self.samples_per_prompt, run_seed=self.seed, iteration=iteration
            )
            if self.model.algorithm.needs_greedy:
                greedy = self._generate(rollout.prompts, 1, _greedy(rollout.sampling), iteration)
                rollout.greedy = [response for (response,) in greedy.groups]
        self.call("on_rollout_end", rollout=rollout)
        return rollout

    def _draw(self, prompts: int) -> list[Prompt]:
        # Taken one update's share at a time, so that an update sees the same responses on any number of ranks.
        share = self.prompts_per_update
        sizes = [share] * (prompts // share) + [prompts % share]
        return [prompt for size in sizes for prompt in self.prompts.take(size)]

    @contextmanager
    def _engine_awake(self) -> Iterator[None]:
        self.call("on_engine_wake", part="weights")
        self.call("on_weight_sync")
        self.call("on_engine_wake", part="cache")
        self.call("on_engine_ready")
        yield
        self.call("on_engine_sleep")

    def _generate(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, iteration: int) -> Rollout:
        mark("sampling")
        return self.rollout.generate(
            prompts, samples_per_prompt=samples, run_seed=self.seed, iteration=iteration, sampling=sampling
        )

    def _score(self) -> None:
        scoring = Scoring(self.model.scorer, self.fabric.world_size)
        self.samples = cast(Rollout, self.samples)
        scoring.score(self.samples)
        if self.model.algorithm.refill_rounds:
            self.samples, metrics = refill(self, self.samples, scoring.score)
            self.callback_metrics |= metrics
        self.callback_metrics |= scoring.compute()
        self.call("on_score_end", rollout=self.samples)

    def _prepare(self) -> None:
        samples = cast(Rollout, self.samples)
        mark("reading the prompts")
        self.batch = Batch.from_rollout(samples, self.model.read(samples.prompts))
        sampling = self.rollout.sampling
        self.callback_metrics |= self.learner.prepare(
            self.batch, sampling.temperature, sampling.max_new_tokens, self._rows_per_update
        )
        self.call("on_advantages_end", batch=self.batch)

    @property
    def _rows_per_update(self) -> int:
        """Responses of an optimizer step on this rank."""
        return self.responses_per_update // self.fabric.world_size

    def _update(self) -> None:
        batch, size = cast(Batch, self.batch), self._rows_per_update
        start = self.progress.update * size % len(batch)
        part = batch.select(range(start, start + size))
        self.call("on_update_start", batch=part)
        sampling = self.rollout.sampling
        train_policy = self.progress.iteration >= self.model.warmup_iterations
        outputs = self.learner.update(part, sampling.temperature, sampling.max_new_tokens, train_policy)
        if train_policy and not outputs["skipped_updates"]:
            self.progress.weight_version += 1
        self.progress.update += 1
        self._add_update_metrics(outputs)
        self.call("on_update_end", outputs=outputs)

    def _add_update_metrics(self, outputs: dict[str, float]) -> None:
        """The row shows the mean over the iteration's updates; of what is counted the sum, of maxima the largest."""
        for name, value in outputs.items():
            before = self.callback_metrics.get(name, value if name.endswith("max") else 0.0)
            self._updates_of[name] = self._updates_of.get(name, 0) + 1  # a skipped one has few metrics
            if name.endswith("max"):
                self.callback_metrics[name] = max(before, value)
            else:
                counted = name.endswith("skipped_updates") or name in ("responses", "tokens")
                self.callback_metrics[name] = before + (value if counted else (value - before) / self._updates_of[name])

    def _end_iteration(self) -> None:
        self.progress.update = 0
        self.progress.iteration += 1
        self.call("on_iteration_end")
        self.fabric.log_dict(self.callback_metrics, step=self.progress.iteration)
        self.samples = self.batch = None

    def evaluate(self, samples_per_prompt: int = 1, temperature: float = 0.0) -> dict[str, float]:
        """Sample and score the validation prompts with the current weights.

        The same seeds at every call, so that two evaluations differ by the weights alone.

        Returns:
            metrics over all ranks, names beginning with ``val/``.

        Raises:
            ValueError: the data module has no validation prompts.
        """
        prompts = self.validation_prompts()
        self.call("on_validation_start")
        sampling = dataclasses.replace(self.rollout.sampling, temperature=temperature, fire=None)
        with self._engine_awake():
            rollout = self._generate(prompts, samples_per_prompt, sampling, iteration=-1)
        scoring = Scoring(self.model.scorer, self.fabric.world_size, "val/")
        scoring.score(rollout)
        metrics = scoring.compute()
        self.call("on_validation_rollout", rollout=rollout)
        self.call("on_validation_end")
        return metrics

    def validation_prompts(self) -> list[Prompt]:
        """This rank's share of them.

        Raises:
            ValueError: the data module has none; on all ranks alike.
        """
        prompts = list(self.datamodule.val_dataloader())
        if not self.fabric.broadcast(len(prompts)):  # rank 0 has the most
            raise ValueError("Validation was asked for, but data.val names no source.")
        if self.limit_val_prompts is not None:
            ranks = self.fabric.world_size
            prompts = prompts[: math.ceil((self.limit_val_prompts - self.fabric.global_rank) / ranks)]
        return prompts

    def _stop_if_asked(self) -> None:
        mark("agreeing on a stop")
        if not (signum := self._stop.agreed(self.fabric)):
            return
        self._stop.signum = signum
        self.should_stop = True
        callback = None if self.fast_dev_run else self.checkpoint_callback
        saved = callback.save(self) if callback else None
        rank_zero_info(f"Stopped. Resume with --ckpt_path {saved}" if saved else "Stopped; no checkpoint callback.")

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything this rank needs besides weights and optimizer to go on exactly from a phase boundary."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "run": self._identity(),
            "iteration": self._begun_with(),
            "metrics": dict(self.callback_metrics),
            "updates_of": dict(self._updates_of),
            "samples": self.samples.state_dict() if self.samples else None,
            "batch": self.batch.state_dict() if self.batch else None,
            "prompts": self.prompts.state_dict(),
            "schedulers": {
                name: one.scheduler.state_dict() for name, one in self.learner.trained.items() if one.scheduler
            },
            "algorithm": self.model.algorithm.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in self.callbacks},
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: the run it came from has another seed, other sizes, another optimizer or schedule, or, from
                inside an iteration, another algorithm or sampling.
        """
        _check_same(state["run"], self._identity(), "set it back, or start anew")
        if state["samples"]:
            until = "inside an iteration; set it back, or change it at an iteration's end"
            _check_same(state["iteration"], self._begun_with(), until)
        self.progress = Progress(**state["progress"])
        self.callback_metrics, self._updates_of = dict(state["metrics"]), dict(state["updates_of"])
        self.samples = Rollout.from_state_dict(state["samples"]) if state["samples"] else None
        self.batch = Batch.from_state_dict(state["batch"]) if state["batch"] else None
        if self.batch is not None and self.samples is not None:
            self.batch.attach(self.samples.of_rows(self.model.read(self.samples.prompts)))
        self.prompts.load_state_dict(state["prompts"])
        for name, scheduler in state["schedulers"].items():
            self.learner.trained[name].scheduler.load_state_dict(scheduler)
        self.model.algorithm.load_state_dict(state["algorithm"])
        for callback in self.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        if state["random"] is not None:
            set_random_state(state["random"])

    def _identity(self) -> dict[str, Any]:
        names = ("seed", "prompts_per_iteration", "samples_per_prompt", "responses_per_update", "epochs_per_iteration")
        sizes = {name: getattr(self, name) for name in names}
        return sizes | self.learner.settings

    def _begun_with(self) -> dict[str, Any]:
        """By what the responses and the batch of an iteration were made, beyond the weights."""
        return {"algorithm": repr(self.model.algorithm), "sampling": repr(self.rollout.sampling)}

    def _check_sizes(self) -> None:
        sizes = ("max_iterations", "prompts_per_iteration", "samples_per_prompt", "responses_per_update")
        further = ("epochs_per_iteration", "tokens_per_microbatch", "sequence_parallel_size", "limit_val_prompts")
        for name in (*sizes, *further):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"trainer.{name} is {size}; it must be at least 1.")
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise ValueError(
                f"trainer.gradient_clip_val is {self.gradient_clip_val}; it must be above 0, or null for no clipping."
            )
        total = self.prompts_per_iteration * self.samples_per_prompt
        if total % self.responses_per_update or self.responses_per_update % self.samples_per_prompt:
            raise ValueError(
                f"trainer.responses_per_update={self.responses_per_update} must divide prompts_per_iteration * "
                f"samples_per_prompt = {total} and be a multiple of samples_per_prompt={self.samples_per_prompt}."
            )

    def sizes(self, ranks: int) -> str:
        """What follows from the configured sizes on so many ranks, to be read before the run.

        Raises:
            ValueError: an update cannot be shared by them.
        """
        updates, prompts = self.updates_per_iteration, self.prompts_per_update
        if prompts % ranks:
            raise ValueError(
                f"An update of {prompts} prompts (responses_per_update / samples_per_prompt) cannot be shared by "
                f"{ranks} ranks; make it a multiple of {ranks}."
            )
        return (
            f"Each iteration: {self.prompts_per_iteration} prompts x {self.samples_per_prompt} responses on {ranks} "
            f"rank(s), {updates} update(s) of {self.responses_per_update} responses "
            f"({self.responses_per_update // ranks} a rank); "
            f"{self.max_iterations} iterations, {self.max_iterations * updates} updates in all.\n"
            f"Algorithm {self.model.algorithm}"
        )


def _check_same(then: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    """Raise ``ValueError`` for what a checkpoint was written with and this run does not have."""
    for name, was in then.items():
        if now.get(name) != was:
            raise ValueError(f"The checkpoint was written with {name}={was}, this run has {now.get(name)}; {remedy}.")


def _try_all(steps: Sequence[Callable[[], Any]]) -> Exception | None:
    """Take every step although some raise; returns the first error, to be raised if that hides no earlier one."""
    first: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            name = getattr(getattr(step, "func", step), "__qualname__", step)
            warnings.warn(f"While ending the run, {name} raised {type(error).__name__}: {error}", stacklevel=2)
            first = first or error
    return first


def _greedy(sampling: Sampling) -> Sampling:
    return dataclasses.replace(sampling, temperature=0.0, fire=None)


def check_validation_sampling(samples_per_prompt: int, temperature: float) -> None:
    """Raise ``ValueError`` for samples that would be equal, or numbers out of range."""
    if samples_per_prompt < 1 or not temperature >= 0:
        raise ValueError(
            f"Validation needs samples_per_prompt ({samples_per_prompt}) of at least 1 and a temperature "
            f"({temperature}) of 0 (greedy) or more."
        )
    if samples_per_prompt > 1 and temperature == 0:
        raise ValueError(f"{samples_per_prompt} greedy samples of a prompt are equal; set a temperature above 0.")
