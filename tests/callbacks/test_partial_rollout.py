"""Unfinished responses go on in the next iteration: whole groups, every token with the log-prob of what drew it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import PartialRollout, TrajectoryWriter, Validation, WeightSync
from lightrft.engines import EngineGroup, TransformersEngine
from lightrft.samples import FIRE, Batch, Media, Prompt, Response, Rollout, Sampling
from lightrft.trainer import RFTTrainer

CONFIG = tiny_run.QWEN2 | {"num_key_value_heads": 2}


class Watch(RFTCallback):
    """Keeps every rollout and batch, the pool between them, and the weights of every version."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.batches: list[Batch] = []
        self.pools: list[list[Response]] = []
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_weight_sync(self, trainer: RFTTrainer, pl_module: Any) -> None:
        self.weights[trainer.progress.weight_version] = tiny_run.weights(trainer)

    def on_rollout_end(self, trainer: RFTTrainer, pl_module: Any, rollout: Rollout) -> None:
        self.rollouts.append(rollout)
        self.pools.append([response for group in trainer.rollout.pool for response in group.responses])

    def on_advantages_end(self, trainer: RFTTrainer, pl_module: Any, batch: Batch) -> None:
        self.batches.append(batch)


class Recording(TransformersEngine):
    """Keeps what it was asked, and reads no media."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Prompt, Sampling, int]] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        self.asked += [(prompt, sampling, seed) for prompt, own in zip(prompts, seeds) for seed in own]
        return super().generate([Prompt(one.uid, one.token_ids, one.text) for one in prompts], sampling, seeds)


def run(
    inputs: Path, root: Path, rollout: PartialRollout, *callbacks: RFTCallback, algorithm: str = "grpo", **options: Any
) -> RFTTrainer:
    reward = tiny_run.shortness_of_odd_sums if algorithm == "dapo" else tiny_run.shortness
    chosen = Algorithm(algorithm, correction="token_tis")
    model = tiny_run.module(inputs, chosen, tiny_run.scoring(reward), config=CONFIG)
    usual = [rollout, WeightSync(), Validation(2), TrajectoryWriter(1, True)]
    return tiny_run.fit(inputs, root, callbacks, usual, model, **options)


def test_groups_are_whole_come_in_the_order_they_began_and_none_is_lost(inputs: Path, tmp_path: Path) -> None:
    watch, rollout = Watch(), tiny_run.partial()
    trainer = run(inputs, tmp_path, rollout, watch, max_iterations=5)
    stream = tiny_run.data(inputs)
    stream.attach(trainer.model.tokenizer, trainer.seed, 0, 1, 56)
    stream.setup("fit")
    order = [prompt.uid for prompt in stream.train_dataloader().take(5 * 4 + 4)]
    trained = [[prompt.uid for prompt in one.prompts] for one in watch.rollouts]
    for uids, one in zip(trained, watch.rollouts):
        assert len(uids) == 4 and uids == sorted(uids, key=order.index)
        for _, response in one:
            assert response.finish_reason == "stop" or len(response.token_ids) == 8
            assert response.text == rollout._detokenizer.decode(response.token_ids.tolist())
    waiting = [group.prompt.uid for group in rollout.pool]
    assert sorted(sum(trained, waiting)) == sorted(order) and waiting == sorted(waiting, key=order.index)
    # Something was carried over, or nothing was tried here: also beyond the next iteration, and a finished group.
    assert any(len(response.segments) > 1 for one in watch.rollouts for _, response in one)
    rows = tiny_run.rows(trainer.log_dir)
    for step, pool in enumerate(watch.pools, start=1):
        goes_on = [one for one in pool if one.finish_reason == "length" and len(one.token_ids) < 8]
        assert float(rows[step]["rollout/in_flight"]) == len(goes_on)
    assert any(float(row.get("rollout/in_flight", 0)) for row in rows.values())


def scores(weights: dict[str, Tensor], trainer: RFTTrainer, prompt: Prompt, response: Response) -> Tensor:
    engine = TransformersEngine()
    actor = trainer.model.actor.transformer.config
    engine.start(actor, trainer.model.tokenizer, torch.device("cpu"), EngineGroup())
    engine.update_weights(weights.items(), 0)
    (found,) = engine.score([torch.cat([prompt.token_ids, response.token_ids])])
    return found[len(prompt.token_ids) - 1 :]


def test_every_token_has_the_log_prob_and_the_importance_ratio_of_the_weights_that_drew_it(
    inputs: Path, tmp_path: Path
) -> None:
    watch = Watch()
    trainer = run(inputs, tmp_path, tiny_run.partial(), watch)
    rows, tried = tiny_run.rows(trainer.log_dir), 0
    for iteration, (rollout, batch) in enumerate(zip(watch.rollouts, watch.batches)):
        current = 2 * iteration  # two updates an iteration
        behind = torch.cat([current - response.versions for _, response in rollout]).double()
        assert float(rows[iteration + 1]["rollout/staleness_mean"]) == pytest.approx(float(behind.mean()))
        assert float(rows[iteration + 1]["rollout/staleness_max"]) == float(behind.max())
        for row, (prompt, response) in enumerate(rollout):
            if len(response.segments) < 2:
                continue
            tried += 1
            versions, length = response.versions, len(response.token_ids)
            assert len(versions) == length and int(versions[-1]) == response.weight_version
            by_version = {v: scores(watch.weights[v], trainer, prompt, response) for v in {*versions.tolist(), current}}
            drawn = torch.stack([by_version[v][at] for at, v in enumerate(versions.tolist())])
            torch.testing.assert_close(response.log_probs, drawn, rtol=0, atol=1e-5)
            ratio = (by_version[current] - drawn).exp()
            assert (ratio - 1).abs().max() > 1e-3
            torch.testing.assert_close(batch.policy_weights[row, :length], ratio.clamp_max(2.0), rtol=0, atol=1e-4)
    assert tried > 2


def test_a_continuation_asks_for_what_is_left_without_the_hot_first_token_and_with_the_media(
    inputs: Path, tmp_path: Path
) -> None:
    class WithMedia(RFTCallback):
        def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Sequence[Prompt]) -> None:
            for prompt in prompts:
                prompt.media = Media(images=(prompt.uid,))

    engine, watch = Recording(), Watch()
    rollout = tiny_run.partial(engine, segment_tokens=3, fire=FIRE(temperature=5.0, top_k=4))
    run(inputs, tmp_path, rollout, WithMedia(), watch)
    asked = [(prompt, sampling, seed) for prompt, sampling, seed in engine.asked if prompt.media]
    lengths = set()
    for prompt, sampling, _ in asked:
        begun = len(prompt.token_ids) - 4  # all prompts are "a+b="
        lengths.add((begun, sampling.max_new_tokens))
        assert (sampling.fire is None) == (begun > 0) and prompt.media == Media(images=(prompt.uid,))
    assert lengths == {(0, 3), (3, 3), (6, 2)}
    assert len({seed for *_, seed in asked}) == len(asked)
    for batch in watch.batches:
        assert not batch.comparable[:, 0].any() and batch.comparable[:, 1:].all()


@pytest.mark.parametrize("segment_tokens", [1, 2])
def test_a_stop_string_across_segments_ends_the_response_where_it_ends(
    inputs: Path, tmp_path: Path, segment_tokens: int
) -> None:
    stops, watch = ("+3=", *(f"{a}{b}" for a in "0246" for b in range(10))), Watch()
    rollout = tiny_run.partial(segment_tokens=segment_tokens, stop=stops, stop_token_ids=(), max_new_tokens=40)
    run(inputs, tmp_path, rollout, watch, max_iterations=2)
    stopped = 0
    for _, response in (pair for one in watch.rollouts for pair in one):
        said = rollout._detokenizer.decode(response.token_ids.tolist())
        assert len(response.token_ids) == len(response.log_probs) == len(response.versions)
        assert not any(stop in said[:-1] for stop in stops)
        ended = next((stop for stop in stops if said.endswith(stop)), "")
        stopped += bool(ended)
        assert response.text == said.removesuffix(ended)
        assert not ended or response.finish_reason == "stop"
    assert stopped > 10


def test_long_responses_do_not_hold_the_batch(inputs: Path, tmp_path: Path) -> None:
    class Counting(TransformersEngine):
        """Steps of the model: a call takes as many as its longest response."""

        steps = 0

        def generate(self, *args: Any) -> list[list[Response]]:
            groups = super().generate(*args)
            self.steps += max((len(one.token_ids) for group in groups for one in group), default=0)
            return groups

    def steps(name: str, rollout: Any) -> int:
        usual = [rollout, WeightSync()]
        model = tiny_run.module(inputs, Algorithm(correction="token_tis"), lr=0.0)
        tiny_run.fit(inputs, tmp_path / name, usual=usual, model=model, max_iterations=6)
        return int(rollout.engine.steps)

    sampling = {"max_new_tokens": 32, "stop_token_ids": (2, 3)}
    waiting = steps("whole", tiny_run.sampler(Counting(), **sampling))
    assert steps("partial", tiny_run.partial(Counting(), segment_tokens=4, **sampling)) < 0.7 * waiting


def test_an_aborted_response_is_complete_and_empty(inputs: Path, tmp_path: Path) -> None:
    class GivesUp(TransformersEngine):
        def generate(self, prompts: Sequence[Prompt], *args: Any) -> list[list[Response]]:
            groups = super().generate(prompts, *args)
            for prompt, group in zip(prompts, groups):
                if len(prompt.token_ids) == 4 + 4:  # on the way
                    empty = torch.zeros(0)
                    group[:] = [Response(empty.long(), empty, "", "abort", one.weight_version) for one in group]
            return groups

    watch = Watch()
    trainer = run(inputs, tmp_path, tiny_run.partial(GivesUp()), watch, max_iterations=2)
    given_up = [one for rollout in watch.rollouts for _, one in rollout if one.finish_reason == "abort"]
    assert given_up and all(one.dropped and not len(one.token_ids) for one in given_up)
    rows = tiny_run.rows(trainer.log_dir).values()
    assert sum(float(row.get("scoring/aborted", 0)) for row in rows) == len(given_up)


# --- ranks ------------------------------------------------------------------------------------------------------------


def on_some_ranks(inputs: Path, root: Path, size: int, span: int, algorithm: str) -> dict[str, Any]:
    """A run of engines over ``span`` ranks."""
    rollout = tiny_run.partial(TransformersEngine(tensor_parallel_size=span))
    options = {"devices": size, "prompts_per_iteration": 8, "responses_per_update": 16, "limit_val_prompts": 1}
    trainer = run(inputs, root, rollout, algorithm=algorithm, **options)
    return {
        "log_dir": trainer.log_dir,
        "held": len(rollout.pool),
        "weights": {name: weight.tolist() for name, weight in tiny_run.weights(trainer).items()},
    }


@pytest.mark.parametrize(("size", "span", "algorithm"), [(2, 1, "dapo"), (4, 2, "grpo"), (4, 1, "remax")])
def test_a_run_is_the_same_on_any_number_of_ranks(
    inputs: Path, tmp_path: Path, size: int, span: int, algorithm: str
) -> None:
    one = on_some_ranks(inputs, tmp_path / "one", 1, 1, algorithm)
    many = ranks.on_ranks(size, on_some_ranks, inputs, tmp_path / "many", size, span, algorithm)
    responses = tiny_run.responses(Path(one["log_dir"]))
    assert any("segments" in line for lines in responses.values() for line in lines)
    assert tiny_run.responses(Path(many[0]["log_dir"])) == responses
    rows, expected = tiny_run.rows(many[0]["log_dir"]), tiny_run.rows(one["log_dir"])
    for step, row in expected.items():
        for metric in row.keys() - {"weight_sync/mismatch_nats", "balance/busiest_over_mean"}:
            assert float(rows[step][metric]) == pytest.approx(float(row[metric]), rel=1e-4, abs=1e-5), (step, metric)
    assert one["held"] == 4
    for rank in many:
        assert rank["held"] == 4 // size
        for weight, values in rank["weights"].items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(one["weights"][weight]), rtol=0, atol=1e-5)


def uneven(inputs: Path, root: Path) -> str:
    with pytest.raises(ValueError, match="groups_in_flight=3 cannot be shared by 2 ranks") as refused:
        run(inputs, root, tiny_run.partial(groups=3), devices=2)
    return str(refused.value)


def test_groups_that_ranks_cannot_share_are_refused(inputs: Path, tmp_path: Path) -> None:
    assert "multiple" in ranks.on_ranks(2, uneven, inputs, tmp_path)[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"segment_tokens": 0}, "segment_tokens is 0"),
        ({"segment_tokens": 8}, "no response is ever carried over"),
        ({"groups": 0}, "waits for every response"),
    ],
)
def test_numbers_without_effect_are_refused(numbers: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run.partial(**numbers)


def test_an_algorithm_without_correction_is_warned_of(inputs: Path, tmp_path: Path) -> None:
    usual = [tiny_run.partial(), WeightSync()]
    with pytest.warns(UserWarning, match="set its correction, for example to token_tis"):
        tiny_run.fit(inputs, tmp_path, usual=usual, max_iterations=1)


@pytest.mark.parametrize(("change", "said"), [({"groups": 2}, "groups_in_flight=4"), ({"top_k": 5}, "sampling=")])
def test_a_checkpoints_groups_go_on_as_they_began(
    inputs: Path, tmp_path: Path, change: dict[str, int], said: str
) -> None:
    run(inputs, tmp_path, tiny_run.partial(), tiny_run.checkpoints(), max_iterations=1)
    with pytest.raises(ValueError, match=said):
        model = tiny_run.module(inputs, Algorithm(correction="token_tis"), config=CONFIG)
        usual = [tiny_run.partial(**change), WeightSync()]
        tiny_run.fit(inputs, tmp_path, usual=usual, model=model, ckpt_path="last")
