"""What every engine that reads media must hold: subclass :class:`MediaContract` and say how the engine is made."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from media_worlds import CONTEXT, MediaWorld, media_world, plain
from torch import Tensor

from lightrft.engines import Engine
from lightrft.media import MediaError, MediaProcessor, placeholder_ids
from lightrft.ops import joined_features
from lightrft.ops.fingerprint import fingerprint
from lightrft.samples import FIRE, Media, Prompt, Response, Sampling

from .contract import assert_log_probs, ids_of, processed_log_probs


def reference_logits(world: MediaWorld, model: Any, prompt: Prompt, tokens: Tensor) -> Tensor:
    """Of a forward over prompt, media and ``tokens`` ``[T]``: what each of these was drawn from, ``[T, V]``.

    Not by placeholders, which are never drawn.
    """
    reading = MediaProcessor(world.processor).read(prompt)
    ids = torch.cat([reading.token_ids, tokens])[None]
    types = {name: torch.cat([own, torch.zeros_like(tokens)])[None] for name, own in reading.token_types.items()}
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **types, **joined_features(reading.items))
    never = torch.tensor(placeholder_ids(world.config))
    return out.logits[0, len(reading.token_ids) - 1 : -1].index_fill(-1, never, -torch.inf)


def reference_log_probs(
    world: MediaWorld, prompt: Prompt, response: Response, sampling: Sampling, model: Any = None
) -> Tensor:
    logits = reference_logits(world, model or world.model, prompt, response.token_ids)
    return processed_log_probs(logits, sampling).gather(1, response.token_ids[:, None])[:, 0].float()


class MediaContract:
    """Subclasses define :meth:`make` and ``family``; they agree with the ``transformers`` forward to ``tolerance``."""

    family: str
    tolerance: float = 2e-5
    reads_videos: bool = True
    device: torch.device = torch.device("cpu")

    @staticmethod
    def make() -> Engine:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def started(cls) -> Iterator[Engine]:
        engine = cls.make()
        engine.start(media_world(cls.family).config, media_world(cls.family).processor, cls.device)
        yield engine
        engine.close()

    @pytest.fixture
    def world(self) -> MediaWorld:
        return media_world(self.family)

    @pytest.fixture
    def engine(self, started, world) -> Engine:
        """Awake with the world's weights as version 0."""
        started.wake()
        started.update_weights(world.weights(), 0)
        return started

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3}], ids=str)
    def test_log_probs_are_those_of_the_forward_over_the_same_media(self, engine, world, options):
        sampling = Sampling(max_new_tokens=6, **options)
        prompts = [
            world.prompt("text", []),
            world.prompt("two", [0, 1]),
            world.prompt("more text", [], length=9),
            world.prompt("one", [2], length=15),
            world.prompt("same twice", [3, 3]),
        ]
        seeds = [[9], [1, 2, 3], [4, 5], [6], [7, 8]]
        groups = engine.generate(prompts, sampling, seeds)
        assert [[response.seed for response in group] for group in groups] == seeds
        for asked, group in zip(prompts, groups):
            for response in group:
                logits = reference_logits(world, world.model, asked, response.token_ids)
                assert_log_probs(response, logits, sampling, self.tolerance)

    def test_log_probs_after_videos_are_those_of_the_forward(self, engine, world):
        if "videos" not in MediaProcessor(world.processor).kinds:
            pytest.skip("its processor has no video")
        prompts = [world.moving("film", [], [0]), world.moving("both", [1, 0], [1, 3]), world.prompt("text", [])]
        if not self.reads_videos:
            with pytest.raises(MediaError, match=r"'film' has videos.*TransformersEngine"):
                engine.generate(prompts, Sampling(max_new_tokens=6), [[1, 2], [3, 4], [5]])
            return
        groups = engine.generate(prompts, Sampling(max_new_tokens=6), [[1, 2], [3, 4], [5]])
        for asked, group in zip(prompts, groups):
            for response in group:
                expected = reference_log_probs(world, asked, response, Sampling())
                assert torch.allclose(response.log_probs, expected, atol=self.tolerance)

    def test_other_media_give_other_log_probs(self, engine, world):
        prompts = [world.prompt("seen", which) for which in ([0], [1], [4])]
        greedy = Sampling(max_new_tokens=6, temperature=0)
        tokens = [group[0].token_ids.tolist() for group in engine.generate(prompts, greedy, [[0]] * 3)]
        assert len(set(map(tuple, tokens))) == 3
        for asked, ids in zip(prompts, tokens):
            logits = reference_logits(world, world.model, asked, torch.tensor(ids))
            assert logits.argmax(-1).tolist() == ids

    def test_pixels_that_are_all_one_are_another_image_in_another_shape(self, engine, world):
        if world.kind != "images":
            pytest.skip("it hears")
        sampling = Sampling(max_new_tokens=4)
        prompts = [
            dataclasses.replace(world.prompt("plain", [0]), media=Media(images=(plain(*size),)))
            for size in ((56, 112), (112, 56))
        ]
        for asked, (response,) in zip(prompts, engine.generate(prompts, sampling, [[1], [2]])):
            expected = reference_log_probs(world, asked, response, sampling)
            assert torch.allclose(response.log_probs, expected, atol=self.tolerance)

    @pytest.mark.parametrize("fire", [None, FIRE(temperature=4.0, top_k=8)], ids=str)
    def test_a_response_is_the_same_alone_in_a_batch_and_in_another_order(self, engine, world, fire):
        sampling = Sampling(max_new_tokens=8, fire=fire)
        prompts = [world.prompt("a", [0, 2]), world.prompt("b", []), world.prompt("c", [1], 20), world.prompt("d", [3])]
        seeds = [[10, 11], [20], [30, 31, 32], [40]]
        together = engine.generate(prompts, sampling, seeds)
        alone = [
            [engine.generate([asked], sampling, [[seed]])[0][0] for seed in own] for asked, own in zip(prompts, seeds)
        ]
        reversed_ = engine.generate(prompts[::-1], sampling, [own[::-1] for own in seeds[::-1]])
        assert ids_of(together) == ids_of(alone) == [group[::-1] for group in ids_of(reversed_)[::-1]]

    def test_placeholders_are_never_drawn_however_likely(self, engine, world):
        asked, ids = world.prompt("seen", [0]), torch.tensor(placeholder_ids(world.config))
        changed = copy.deepcopy(world.model)
        with torch.no_grad():
            best = reference_logits(world, changed, asked, torch.tensor([0]))[0].argmax()
            changed.lm_head.weight[ids] = 2 * changed.lm_head.weight[best]
        engine.update_weights([(n, p.detach().clone()) for n, p in changed.named_parameters()], 1)
        sampling = Sampling(max_new_tokens=4, temperature=1.3)
        (group,) = engine.generate([asked], sampling, [list(range(16))])
        for response in group:
            assert not bool(torch.isin(response.token_ids, ids).any())
            expected = reference_log_probs(world, asked, response, sampling, changed)
            assert torch.allclose(response.log_probs, expected, atol=self.tolerance)

    def test_no_seeds_give_an_empty_list(self, engine, world):
        groups = engine.generate(
            [world.prompt("a", [0]), world.prompt("b", [1])], Sampling(max_new_tokens=2), [[], [1]]
        )
        assert [len(group) for group in groups] == [0, 1]

    # Weights

    def test_every_weight_that_the_engine_keeps_is_found_as_it_was_pushed(self, engine, world):
        in_its_dtype = [(name, tensor.to(engine.dtype)) for name, tensor in world.weights()]
        pushed = {name: kept for given, tensor in in_its_dtype for name, kept in engine.stored(given, tensor).items()}
        assert {world.projector, "lm_head.weight"} < pushed.keys()
        assert sum(name.startswith(world.tower) for name in pushed) > 10
        assert engine.fingerprint(list(pushed)) == {name: fingerprint(tensor) for name, tensor in pushed.items()}

    @pytest.mark.parametrize("part", ["tower", "projector"])
    def test_a_push_of_what_sees_or_hears_alone_changes_the_answer_for_media_read_before(self, engine, world, part):
        asked, sampling = world.prompt("seen", [0, 1]), Sampling(max_new_tokens=6)
        before = engine.generate([asked], sampling, [[1]])[0][0]
        changed = {name: tensor * 1.5 for name, tensor in world.weights() if name.startswith(getattr(world, part))}
        engine.update_weights(list(changed.items()), 1)
        response = engine.generate([asked], sampling, [[1]])[0][0]
        model = copy.deepcopy(world.model)
        model.load_state_dict(changed, strict=False)
        expected = reference_log_probs(world, asked, response, sampling, model)
        assert torch.allclose(response.log_probs, expected, atol=self.tolerance)
        old = reference_log_probs(world, asked, response, sampling)
        assert (old - expected).abs().max() > 10 * self.tolerance
        assert (before.weight_version, response.weight_version) == (0, 1)

    def test_asleep_and_awake_it_goes_on_as_before(self, engine, world):
        prompts, sampling = [world.prompt("a", [0, 2]), world.prompt("b", [])], Sampling(max_new_tokens=6)
        before = engine.generate(prompts, sampling, [[1, 2], [3]])
        for level in (1, 2):
            engine.sleep(level)
            engine.wake(("weights",))
            if level == 2:
                engine.update_weights(world.weights(), 1)
            engine.wake(("cache",))
            assert ids_of(engine.generate(prompts, sampling, [[1, 2], [3]])) == ids_of(before)

    # Refusals

    @pytest.mark.parametrize("given", [[], [0, 1]], ids=["one too few", "one too many"])
    def test_placeholders_that_do_not_match_the_media_are_refused_by_name(self, engine, world, given):
        right = world.prompt("right", [0])
        media = Media(**{world.kind: tuple(map(world.reference, given))})
        wrong = dataclasses.replace(world.prompt("wrong", [0]), media=media)
        with pytest.raises(MediaError, match=rf"'wrong' has {len(given)} {world.kind}, but 1 of"):
            engine.generate([right, wrong], Sampling(max_new_tokens=2), [[1], [2]])
        self._still_serves(engine, world)

    def test_placeholders_that_are_expanded_already_are_refused_by_name(self, engine, world):
        expanded = MediaProcessor(world.processor).read(world.prompt("wide", [0])).token_ids
        with pytest.raises(MediaError, match=r"'wide'.*not expanded"):
            engine.generate(
                [dataclasses.replace(world.prompt("wide", [0]), token_ids=expanded)], Sampling(max_new_tokens=2), [[1]]
            )

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            (b"no picture and no sound", "23 bytes"),
            ("/nowhere/at all", "/nowhere/at all.*No such file"),
            ("https://example.com/cat", "URLs are not fetched"),
            ("data:image/png;base64,????", "data URI"),
            (7, "a int is no reference"),
        ],
        ids=["bytes", "path", "url", "uri", "number"],
    )
    def test_an_item_that_cannot_be_read_is_refused_by_prompt_and_index(self, engine, world, bad, says):
        good = world.prompt("good", [0])
        broken = world.prompt("broken", [0, 1])
        broken = dataclasses.replace(broken, media=Media(**{world.kind: (world.reference(0), bad)}))
        item = {"images": "image", "audios": "audio"}[world.kind]
        with pytest.raises((MediaError, ImportError), match=rf"(?s)'broken': {item} 1 .*{says}"):
            engine.generate([good, broken], Sampling(max_new_tokens=2), [[1], [2]])
        self._still_serves(engine, world)

    def test_another_kind_of_media_is_refused_by_name(self, engine, world):
        for kind in {"images", "audios", "videos"} - MediaProcessor(world.processor).kinds:
            asked = Prompt("odd", torch.tensor([20]), "", media=Media(**{kind: ("x",)}))
            with pytest.raises(MediaError, match=rf"'odd' has 1 {kind}"):
                engine.generate([asked], Sampling(max_new_tokens=2), [[1]])

    def test_the_context_counts_what_media_take(self, engine, world):
        asked = world.prompt("wordy", [0], length=CONTEXT // 2)
        tokens = len(MediaProcessor(world.processor).read(asked).token_ids)
        assert tokens > len(asked.token_ids) + 2
        room = CONTEXT - tokens
        assert len(engine.generate([asked], Sampling(max_new_tokens=room), [[1]])[0]) == 1
        with pytest.raises(ValueError, match=rf"'wordy' has {tokens} tokens.*{room + 1}.*{CONTEXT}"):
            engine.generate([asked], Sampling(max_new_tokens=room + 1), [[1]])
        self._still_serves(engine, world)

    def _still_serves(self, engine: Engine, world: MediaWorld) -> None:
        sampling, asked = Sampling(max_new_tokens=3), world.prompt("after", [0, 1])
        (response,) = engine.generate([asked], sampling, [[9]])[0]
        expected = reference_log_probs(world, asked, response, sampling)
        assert torch.allclose(response.log_probs, expected, atol=self.tolerance)
