"""AheadRollout: the engine samples the next iteration's responses while the trainer learns from this one's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from lightrft import samples
from lightrft.callbacks.engine_sleep_wake import EngineSleepWake
from lightrft.callbacks.in_flight import Group, InFlight
from lightrft.engines import Engine
from lightrft.samples import Prompt, Response, Sampling
from lightrft.whereabouts import mark


class AheadRollout(InFlight):
    """A rollout that is one iteration ahead of training, for an engine in a process of its own.

    Iteration ``i`` trains on what the weights of iteration ``i - 1`` answered, every token of it one iteration's
    updates behind. Its engine, once it has the weights that begin iteration ``i``, samples for ``i + 1`` in a thread
    while the trainer scores and learns. The first iteration waits for its own responses; after the last one nothing is
    sampled.

    Whatever else needs the engine (a push of weights, validation, a greedy baseline), and a checkpoint, waits until
    the responses are there; save at an iteration's end, where they must be there anyway.

    Args:
        engine, sampling: as in :class:`~lightrft.callbacks.Rollout`.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        self._pending: tuple[list[Group], slice, Future[list[list[Response]]]] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start the engine.

        Raises:
            ValueError: it computes in this process, or is put to sleep.
        """
        if not self.engine.in_own_process:
            raise ValueError(
                f"AheadRollout samples while the trainer computes, but {type(self.engine).__name__} computes in the "
                "trainer's process; choose an engine in a process of its own, or lightrft.callbacks.Rollout."
            )
        if any(isinstance(callback, EngineSleepWake) for callback in trainer.callbacks):
            raise ValueError(
                "AheadRollout keeps the engine busy while the trainer computes, EngineSleepWake would put it to sleep "
                "then; remove one of them from trainer.callbacks."
            )
        self.groups_in_flight = trainer.prompts_per_iteration
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout ahead")
        super().setup(trainer, pl_module, stage)

    def on_engine_wake(self, trainer: Any, pl_module: Any, part: str) -> None:
        """The engine is wanted, and has to be idle."""
        self._collect()

    def on_engine_sleep(self, trainer: Any, pl_module: Any) -> None:
        """Nobody needs the engine until the next iteration: let it sample for that."""
        if trainer.progress.iteration + 1 < trainer.max_iterations:
            self._submit(self.pool)

    def sample(
        self, prompts: Sequence[Prompt], *, samples_per_prompt: int, run_seed: int, iteration: int
    ) -> samples.Rollout:
        self._enter(prompts, samples_per_prompt, run_seed, iteration)
        count = len(self.pool) - self.groups_in_flight // self._ranks
        ready, self.pool = self.pool[:count], self.pool[count:]
        # What nobody sampled ahead: all in the first iteration.
        self._submit(ready)
        self._collect()
        return self._rollout(ready)

    def generate(self, *args: Any, **kwargs: Any) -> samples.Rollout:
        self._collect()
        return super().generate(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        self._collect()
        return super().state_dict()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Closed under its hands, the engine might not end; that it failed is no news while the run ends.
        if self._pending:
            wait([self._pending[2]])
            self._pending = None
        super().teardown(trainer, pl_module, stage)

    def _submit(self, groups: Sequence[Group]) -> None:
        """Have those sampled that have no responses yet. Collective over the engine's ranks."""
        waiting = [group for group in groups if not group.responses]
        if not waiting:  # on every rank, as all hold as many
            return
        asked, seeds, own = self._group.join([one.prompt for one in waiting], [one.seeds for one in waiting])
        self._pending = waiting, own, self._thread.submit(self.engine.generate, asked, self.sampling, seeds)

    def _collect(self) -> None:
        """Wait for what is being sampled; what the thread raised is raised here."""
        if self._pending is None:
            return
        (waiting, own, answers), self._pending = self._pending, None
        mark("waiting for responses sampled ahead")  # of which the engine marks each token, in the thread
        for group, responses in zip(waiting, answers.result()[own], strict=True):
            group.responses = responses
