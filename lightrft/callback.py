"""The vocabulary of hooks. Callbacks announce and observe; the one that returns data is :class:`RolloutCallback`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl

from lightrft.engines.base import Engine, WakePart
from lightrft.samples import Batch, Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from lightrft.module import RFTModule
    from lightrft.trainer import RFTTrainer

Phase = Literal["rollout", "score", "advantages", "update", "iteration"]


class RFTCallback(pl.Callback):
    """Base of every callback of :class:`~lightrft.trainer.RFTTrainer`.

    Hooks keep Lightning's name where the moment is the same; the new ones are below. All arguments are passed by
    keyword. One iteration fires, in order::

        on_iteration_start
          on_phase_start("rollout")
            on_rollout_start  on_engine_wake("weights")  on_weight_sync  on_engine_wake("cache")  on_engine_ready
            on_engine_sleep  on_rollout_end
          on_phase_end("rollout")
          on_phase_start("score")       on_score_end                    on_phase_end("score")
          on_phase_start("advantages")  on_advantages_end               on_phase_end("advantages")
          on_phase_start("update")      on_update_start  on_update_end  on_phase_end("update")
          ... one update phase for each optimizer step
          on_phase_start("iteration")   on_iteration_end                on_phase_end("iteration")

    ``on_phase_end`` is a boundary: the trainer's state is complete there, so a checkpoint taken in it resumes exactly.
    Inherited from Lightning: ``setup`` (processes exist, modules are placed), ``on_fit_start``, ``on_fit_end``,
    ``on_validation_start``, ``on_validation_end``, ``on_exception``, ``teardown``; ``state_dict`` and
    ``load_state_dict`` (tensors, numbers, strings, lists and dicts of these). Lightning's other hooks are never called.
    """

    def on_iteration_start(self, trainer: RFTTrainer, pl_module: RFTModule) -> None:
        """A new iteration begins (not called again when a run resumes inside one)."""

    def on_iteration_end(self, trainer: RFTTrainer, pl_module: RFTModule) -> None:
        """All updates are done; what is logged here belongs to this iteration's row."""

    def on_phase_start(self, trainer: RFTTrainer, pl_module: RFTModule, phase: Phase) -> None:
        """A phase begins."""

    def on_phase_end(self, trainer: RFTTrainer, pl_module: RFTModule, phase: Phase) -> None:
        """A phase is over and the trainer's state is complete: the place to save."""

    def on_rollout_start(self, trainer: RFTTrainer, pl_module: RFTModule, prompts: Sequence[Prompt]) -> None:
        """This rank's prompts are drawn; none of them is answered yet.

        Where an algorithm refills groups, the hooks of a rollout come again in the phase ``score``, once a round.
        """

    def on_rollout_end(self, trainer: RFTTrainer, pl_module: RFTModule, rollout: Rollout) -> None:
        """Responses are sampled, not yet scored."""

    def on_engine_wake(self, trainer: RFTTrainer, pl_module: RFTModule, part: WakePart) -> None:
        """The engine is about to be used, in training or validation: this part of it must be awake from here on.

        First ``weights``; once they are current, ``cache``: so peak memory stays that of one phase.
        """

    def on_weight_sync(self, trainer: RFTTrainer, pl_module: RFTModule) -> None:
        """The engine's weights can be written: push what is newer."""

    def on_engine_ready(self, trainer: RFTTrainer, pl_module: RFTModule) -> None:
        """The engine is awake, and sampling comes next."""

    def on_engine_sleep(self, trainer: RFTTrainer, pl_module: RFTModule) -> None:
        """The engine is not needed until the next ``on_engine_wake``."""

    def on_score_end(self, trainer: RFTTrainer, pl_module: RFTModule, rollout: Rollout) -> None:
        """Every response has its reward, or was dropped."""

    def on_advantages_end(self, trainer: RFTTrainer, pl_module: RFTModule, batch: Batch) -> None:
        """Log-probs of old policy and reference, and advantages, are in ``batch`` (all of this rank's responses)."""

    def on_update_start(self, trainer: RFTTrainer, pl_module: RFTModule, batch: Batch) -> None:
        """An optimizer step over ``batch`` begins."""

    def on_update_end(self, trainer: RFTTrainer, pl_module: RFTModule, outputs: dict[str, float]) -> None:
        """An optimizer step is done; ``outputs`` are its metrics, already those of all ranks."""

    def on_validation_rollout(self, trainer: RFTTrainer, pl_module: RFTModule, rollout: Rollout) -> None:
        """This rank's validation responses are sampled and scored."""

    def reshard(self, states: list[dict[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
        """This rank's state where a run on ``ranks`` ranks resumes one on another number of them.

        To be overridden where states are not the same on every rank.

        Args:
            states: of :meth:`state_dict`, one for each rank there was.
            rank: this one.
            ranks: how many there are.
        """
        return states[rank if rank < len(states) else 0]


class RolloutCallback(RFTCallback):
    """The callback that turns prompts into responses. ``trainer.rollout`` finds the one of a run.

    Attributes:
        engine: samples the responses; started in ``setup``, closed in ``teardown``.
        sampling: how training responses are drawn.
    """

    engine: Engine
    sampling: Sampling

    def prompts_to_draw(self, prompts: int) -> int:
        """How many prompts, over all ranks, :meth:`sample` must be given for it to answer ``prompts`` of them."""
        return prompts

    def sample(self, prompts: Sequence[Prompt], *, samples_per_prompt: int, run_seed: int, iteration: int) -> Rollout:
        """Training responses. Their prompts may be earlier ones, those given being kept for later.

        Args:
            prompts: this rank's part of as many as :meth:`prompts_to_draw` asked for.
            samples_per_prompt, run_seed, iteration: as in :meth:`generate`.

        Returns:
            this rank's part of as many groups as were asked for, each whole: of every optimizer step's share one block.
        """
        return self.generate(
            prompts,
            samples_per_prompt=samples_per_prompt,
            run_seed=run_seed,
            iteration=iteration,
            sampling=self.sampling,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        run_seed: int,
        iteration: int,
        sampling: Sampling | None = None,
    ) -> Rollout:
        """Sample ``samples_per_prompt`` responses to each prompt; a fixed function of weights, prompts and seeds.

        With the current weights, at once: for validation and greedy baselines.
        """
        raise NotImplementedError


class CheckpointCallback(RFTCallback):
    """The callback that writes checkpoints. ``trainer.checkpoint_callback`` finds the one of a run."""

    dirpath: str | None = None
    last_checkpoint: Path | None = None

    def save(self, trainer: RFTTrainer) -> Path:
        """Write a checkpoint now, at a phase boundary, on all ranks together; returns its folder once it is there."""
        raise NotImplementedError


_INHERITED = ("on_fit_start", "on_fit_end", "on_validation_start", "on_validation_end", "on_exception")
HOOKS = frozenset({"setup", "teardown", *_INHERITED, *(name for name in vars(RFTCallback) if name.startswith("on_"))})
"""What :class:`~lightrft.trainer.RFTTrainer` calls."""


def check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse what would stay silent: a hook that is never called, and state of which a checkpoint keeps one alone.

    Raises:
        ValueError: names the method and the closest hook, or the class that is listed twice.
    """
    for callback in callbacks:
        _check_hook_names(type(callback))
    keys = [one.state_key for one in callbacks if type(one).state_dict is not pl.Callback.state_dict]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(
                f"trainer.callbacks lists {keys.count(key)} of {key}, whose states a checkpoint could not tell apart; "
                "keep one, or give the class a state_key of its arguments."
            )


def _check_hook_names(kind: type) -> None:
    for name in dir(kind):
        own = callable(getattr(kind, name)) and getattr(kind, name) is not getattr(pl.Callback, name, None)
        if name.startswith("on_") and own and name not in HOOKS:
            # Lightning's own names lie close to its other ones, which mean another moment.
            close = [] if hasattr(pl.Callback, name) else difflib.get_close_matches(name, sorted(HOOKS), n=1)
            hint = f"did you mean {close[0]}?" if close else f"hooks are {', '.join(sorted(HOOKS))}."
            raise ValueError(f"{kind.__name__}.{name} is no hook of RFTCallback and would never be called; {hint}")


def the_one(callbacks: Sequence[pl.Callback], kind: type) -> Any:
    """The callback of that type, ``None`` if there is none.

    Raises:
        ValueError: several of them.
    """
    found = [callback for callback in callbacks if isinstance(callback, kind)]
    if len(found) > 1:
        raise ValueError(f"trainer.callbacks lists {len(found)} of {kind.__name__}; keep one.")
    return found[0] if found else None
