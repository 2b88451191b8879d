"""What every engine must hold: subclass :class:`EngineContract` and say how the engine is made.

One engine is alive at a time, shared by a class's tests, because real ones take seconds to start and may be the only
one a process can hold.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from lightrft.engines import Engine, EngineError, EngineGroup
from lightrft.media import placeholder_ids
from lightrft.ops.fingerprint import fingerprint
from lightrft.samples import FIRE, Prompt, Response, Sampling

PIECES = [*"abcdefghijklmnopqrstuvwxyz0123456789 .", "ab", "bc", "the", "##", "x##y", "\n\n"]
CONTEXT = 128


@dataclass
class World:
    """The trainer's side: a tiny model with a decided taste, and a tokenizer shorter than its vocabulary."""

    config: Any
    tokenizer: Any
    model: Any

    def weights(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor.detach().clone()) for name, tensor in self.model.named_parameters()]


def make_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "<eos>", "<tool>", *PIECES]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    return wrapped


@functools.cache
def world(tied: bool = False) -> World:
    # Heads of 32: the smallest that every engine takes.
    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform, so that truncation and temperature matter
    return World(config, make_tokenizer(), model)


def prompt(length: int, uid: str = "", first: int = 3) -> Prompt:
    ids = [3 + (first + 7 * i) % 40 for i in range(length)]
    return Prompt(uid or f"p{length}-{first}", torch.tensor(ids), "")


def text_of(ids: list[int]) -> str:
    tokenizer = world().tokenizer
    return tokenizer.decode([token for token in ids if token < len(tokenizer)], skip_special_tokens=True)


def ids_of(groups: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids.tolist() for response in group] for group in groups]


def processed_log_probs(logits: Tensor, sampling: Sampling, ties: float = 0.0) -> Tensor:
    """The distribution a user asked for, written out token by token: ``[T, V]``.

    Logits that differ by no more than ``ties`` count as equal; all that equal the last of ``top_k`` are kept.
    """
    rows = []
    for row in logits.double() / sampling.temperature:
        probs = row.softmax(-1)
        keep = probs >= sampling.min_p * probs.max()
        if sampling.top_k:
            keep &= row >= row.sort(descending=True).values[sampling.top_k - 1] - ties
        if sampling.top_p < 1:
            kept = torch.where(keep, probs, 0.0) / probs[keep].sum()
            order = kept.argsort(descending=True)
            before = kept[order].cumsum(0) - kept[order]
            keep[order[before >= sampling.top_p]] = False
        rows.append(torch.where(keep, row, -torch.inf).log_softmax(-1))
    return torch.stack(rows)


def response_logits(model: Any, prompt: Prompt, response: Response) -> Tensor:
    """Of a forward over prompt and response: what each response token was drawn from, ``[T, V]``."""
    ids = torch.cat([prompt.token_ids, response.token_ids])
    with torch.no_grad():
        return model(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1]


def drawn_from(model: Any, prompt: Prompt, response: Response) -> Tensor:
    """Its logits ``[T, V]``, without those of placeholders."""
    never = torch.tensor(placeholder_ids(model.config), dtype=torch.int64)
    return response_logits(model, prompt, response).index_fill(-1, never, -torch.inf)


def reference_log_probs(model: Any, prompt: Prompt, response: Response, sampling: Sampling) -> Tensor:
    logits = drawn_from(model, prompt, response)
    return processed_log_probs(logits, sampling).gather(1, response.token_ids[:, None])[:, 0].float()


def at_the_edges(logits: Tensor, sampling: Sampling, tolerance: float) -> list[Tensor]:
    """Log-probs ``[T, V]``, first as asked, then with tokens at the edge of what is kept on either side of it.

    Shifts lie closer than the tolerance: a token that an engine keeps beyond those of one shift changes less than that.
    """
    shifts = [0.0, *(tolerance * half / 2 for half in range(-4, 5) if half)]
    return [
        processed_log_probs(
            logits,
            dataclasses.replace(
                sampling, min_p=sampling.min_p * (1 + edge), top_p=min(1.0, sampling.top_p * (1 + mass))
            ),
            ties=ties,
        )
        for edge, mass, ties in itertools.product(
            shifts if sampling.min_p else [0.0],
            shifts if sampling.top_p < 1 else [0.0],
            [0.0, tolerance] if sampling.top_k else [0.0],
        )
    ]


def assert_log_probs(response: Response, logits: Tensor, sampling: Sampling, tolerance: float) -> None:
    """They are those of what its tokens were drawn from, logits ``[T, V]``."""
    own = response.token_ids[:, None]
    expected = torch.stack([one.gather(1, own)[:, 0].float() for one in at_the_edges(logits, sampling, tolerance)])
    gaps = (expected - response.log_probs).abs().amin(0)
    assert bool((gaps <= tolerance).all()), (response.log_probs, expected[0])


def kept(logits: Tensor, sampling: Sampling, tolerance: float) -> tuple[Tensor, Tensor]:
    """Log-probs ``[T, V]``, and for which rows no token is so near the edge that rounding decides, bool ``[T]``."""
    asked, *sides = at_the_edges(logits, sampling, tolerance)
    decided = torch.ones(len(asked), dtype=torch.bool)
    for side in sides:
        decided &= (side.isfinite() == asked.isfinite()).all(-1)
    return asked, decided


def assert_drawn_from(tokens: Tensor, probs: Tensor) -> None:
    """Chi-square of int64 ``tokens`` ``[N]``, each drawn from its row of ``probs`` ``[N, V]``, within 5 sigma."""
    assert (probs.gather(1, tokens[:, None]) > 0).all()
    expected, counts = probs.sum(0), torch.bincount(tokens, minlength=probs.shape[1]).double()
    often = expected >= 5
    statistic = float(((counts - expected) ** 2 / expected)[often].sum())
    freedom = int(often.sum())
    assert freedom > 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


class EngineContract:
    """Subclasses define :meth:`make`; float32 engines must agree with the ``transformers`` forward to ``tolerance``."""

    tolerance: float = 1e-5
    one_stream: bool = True  # whether a hot first token and those after it are drawn from one stream
    device: torch.device = torch.device("cpu")

    @staticmethod
    def make() -> Engine:
        raise NotImplementedError

    @staticmethod
    def group() -> EngineGroup:
        """The ranks that hold the engine."""
        return EngineGroup()

    @pytest.fixture(scope="class")
    @classmethod
    def started(cls) -> Iterator[Callable[[], Engine]]:
        """Gives the class's engine, started anew where one without weights is wanted, or the last was given away."""
        engines: list[Engine] = []
        untouched = False

        def engine(bare: bool = False, last: bool = False) -> Engine:
            nonlocal untouched
            if bare and engines and not (untouched and engines[0].weight_version == -1):
                engines.pop().close()
            if not engines:
                engines.append(cls.make())
                engines[0].start(world().config, world().tokenizer, cls.device, cls.group())
            untouched = bare
            return engines.pop() if last else engines[0]

        yield engine
        for left in engines:
            left.close()

    @pytest.fixture
    def bare(self, started) -> Engine:
        """Started, nothing pushed."""
        return started(bare=True)

    @pytest.fixture
    def engine(self, started) -> Engine:
        """Awake with the world's weights as version 0."""
        engine = started()
        engine.wake()
        engine.update_weights(world().weights(), 0)
        return engine

    # Weights

    def test_an_engine_without_weights_refuses_to_sample_and_to_score(self, bare):
        assert bare.weight_version == -1
        with pytest.raises(EngineError, match="push"):
            bare.generate([prompt(3)], Sampling(max_new_tokens=2), [[1]])
        with pytest.raises(EngineError, match="push"):
            bare.score([torch.tensor([3, 4])])

    def test_a_first_push_that_misses_a_weight_is_refused_and_names_it(self, bare):
        with pytest.raises(EngineError, match=r"lm_head\.weight"):
            bare.update_weights([item for item in world().weights() if item[0] != "lm_head.weight"], 3)
        assert bare.weight_version == -1
        bare.update_weights(world().weights(), 4)
        assert bare.weight_version == 4

    @pytest.mark.parametrize("bad", ["model.nonsense.weight", "model.norm.weight"])
    def test_an_unknown_name_or_wrong_shape_is_named_and_leaves_the_weights_unusable(self, engine, bad):
        with pytest.raises(EngineError, match=bad.replace(".", r"\.")):
            engine.update_weights([(bad, torch.zeros(3))], 1)
        assert engine.weight_version == -1
        with pytest.raises(EngineError, match="push"):
            engine.generate([prompt(3)], Sampling(max_new_tokens=2), [[1]])
        with pytest.raises(EngineError):  # a partial push does not cure it
            engine.update_weights(world().weights()[:1], 2)
        engine.update_weights(world().weights(), 3)
        assert engine.weight_version == 3
        assert len(engine.generate([prompt(3)], Sampling(max_new_tokens=2), [[1]])[0]) == 1

    def test_a_push_that_breaks_off_midway_leaves_the_weights_unusable(self, engine):
        def broken() -> Iterator[tuple[str, Tensor]]:
            yield world().weights()[0]
            raise ConnectionError("rank 3 is gone")

        with pytest.raises(ConnectionError):
            engine.update_weights(broken(), 1)
        assert engine.weight_version == -1

    def test_fingerprints_are_those_of_the_pushed_tensors_in_the_engines_dtype(self, engine):
        pushed = dict(world().weights())
        assert engine.fingerprint(list(pushed)) == {
            name: fingerprint(tensor.to(engine.dtype)) for name, tensor in pushed.items()
        }
        with pytest.raises(EngineError, match="nonsense"):
            engine.fingerprint(["nonsense"])

    def test_a_partial_push_changes_what_it_names_and_the_version(self, engine):
        name, other = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
        before = engine.fingerprint([name, other])
        new = dict(world().weights())[name] * 1.5
        engine.update_weights([(name, new)], 7)
        after = engine.fingerprint([name, other])
        assert (after[name], after[other]) == (fingerprint(new.to(engine.dtype)), before[other])
        assert engine.weight_version == 7
        assert engine.generate([prompt(3)], Sampling(max_new_tokens=1), [[1]])[0][0].weight_version == 7

    def test_new_weights_are_what_samples_even_for_a_prompt_seen_before(self, engine):
        sequence = torch.arange(3, 40)
        old = engine.score([sequence])[0]
        engine.generate([Prompt("seen", sequence, "")], Sampling(max_new_tokens=2), [[1]])
        scaled = [(name, tensor * (1.3 if "layers" in name else 1)) for name, tensor in world().weights()]
        engine.update_weights(scaled, 1)
        changed = engine.score([sequence])[0]
        response = engine.generate([Prompt("seen", sequence, "")], Sampling(max_new_tokens=2), [[1]])[0][0]
        full = torch.cat([sequence, response.token_ids])
        assert (old - changed).abs().max() > 1e-2
        assert torch.allclose(
            engine.score([full])[0][len(sequence) - 1 :], response.log_probs, atol=max(1e-4, self.tolerance)
        )

    # Log-probs

    def test_scores_are_the_log_probs_of_the_trainers_forward(self, engine):
        sequences = [prompt(length).token_ids for length in (1, 9, 2, 30)]
        scores = engine.score(sequences)
        for sequence, score in zip(sequences, scores):
            with torch.no_grad():
                logits = world().model(sequence[None]).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
            assert score.dtype == torch.float32 and score.shape == (len(sequence) - 1,)
            assert torch.allclose(score, expected, atol=self.tolerance)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 0.7},
            {"temperature": 1.3},
            {"top_k": 5},
            {"top_p": 0.8},
            {"min_p": 0.1},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
            {"temperature": 1.3, "top_k": 12, "min_p": 0.05},
            {"temperature": 1.3, "top_p": 0.9},
            {"top_p": 0.6, "min_p": 0.2},
        ],
        ids=str,
    )
    def test_log_probs_are_of_the_distribution_the_token_was_drawn_from(self, engine, options):
        sampling = Sampling(max_new_tokens=6, **options)
        prompts = [prompt(3), prompt(11), prompt(6)]
        groups = engine.generate(prompts, sampling, [[1, 2, 3], [4, 5], [6]])
        for asked, group in zip(prompts, groups):
            for response in group:
                assert response.log_probs.dtype == torch.float32
                assert_log_probs(response, drawn_from(world().model, asked, response), sampling, self.tolerance)

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_p": 0.55}], ids=str)
    def test_tokens_are_drawn_as_often_as_the_distribution_says(self, engine, options):
        sampling = Sampling(max_new_tokens=2, **options)
        draws = 1500
        group = engine.generate([prompt(5)], sampling, [range(draws)])[0]
        firsts = torch.stack([response.token_ids[0] for response in group])
        sequences = torch.cat([prompt(5).token_ids.expand(64, -1), torch.arange(64)[:, None]], 1)
        with torch.no_grad():
            logits = world().model(sequences).logits
        first, decided = kept(logits[:1, 4], sampling, self.tolerance)
        assert bool(decided.all())
        assert_drawn_from(firsts, first.exp().expand(draws, -1))
        # The second token by the first: a number used twice would show here.
        second, decided = kept(logits[:, 5], sampling, self.tolerance)
        going_on = [one for one in group if len(one.token_ids) == 2 and decided[one.token_ids[0]]]
        after = torch.stack([response.token_ids for response in going_on])
        assert len(going_on) > draws / 2
        assert_drawn_from(after[:, 1], second.exp()[after[:, 0]])

    def test_greedy_takes_the_likeliest_token_with_log_prob_zero(self, engine):
        asked = prompt(7)
        response = engine.generate([asked], Sampling(max_new_tokens=8, temperature=0), [[5]])[0][0]
        full = torch.cat([asked.token_ids, response.token_ids])
        with torch.no_grad():
            likeliest = world().model(full[None]).logits[0].argmax(-1)[len(asked.token_ids) - 1 : -1]
        assert response.token_ids.tolist() == likeliest.tolist()
        assert response.log_probs.tolist() == [0.0] * len(likeliest)

    # A hot first token

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 2, "top_p": 0.9, "min_p": 0.05}], ids=str)
    def test_a_hot_first_token_has_its_own_distribution_and_the_later_ones_theirs(self, engine, options):
        hot = Sampling(max_new_tokens=6, fire=FIRE(temperature=5.0, top_k=6), **options)
        prompts = [prompt(3), prompt(11), prompt(1)]
        groups = engine.generate(prompts, hot, [range(30), [4, 5], [6]])
        for asked, group in zip(prompts, groups):
            for response in group:
                logits, first = response_logits(world().model, asked, response), response.token_ids[0]
                values, tokens = logits[0].topk(6)
                assert first in tokens
                expected = (values / 5.0).log_softmax(-1)[tokens == first]
                assert torch.allclose(response.log_probs[:1], expected, atol=self.tolerance)
                later = reference_log_probs(world().model, asked, response, dataclasses.replace(hot, fire=None))
                assert torch.allclose(response.log_probs[1:], later[1:], atol=self.tolerance)
        assert len({int(response.token_ids[0]) for response in groups[0]}) > 2  # the other top-k is not the first's

    def test_very_hot_first_tokens_are_uniform_over_the_likeliest_and_the_later_ones_as_ever(self, engine):
        hot, draws = Sampling(max_new_tokens=2, temperature=0.6, fire=FIRE(temperature=1e4, top_k=8)), 1500
        group = engine.generate([prompt(5)], hot, [range(draws)])[0]
        sequences = torch.cat([prompt(5).token_ids.expand(64, -1), torch.arange(64)[:, None]], 1)
        with torch.no_grad():
            logits = world().model(sequences).logits
        uniform = torch.zeros(64, dtype=torch.float64).index_fill_(0, logits[0, 4].topk(8).indices, 1 / 8)
        assert_drawn_from(torch.stack([response.token_ids[0] for response in group]), uniform.expand(draws, -1))
        second = processed_log_probs(logits[:, 5], dataclasses.replace(hot, fire=None)).exp()
        after = torch.stack([response.token_ids for response in group if len(response.token_ids) == 2])
        assert len(after) > draws / 2
        assert_drawn_from(after[:, 1], second[after[:, 0]])

    def test_a_first_token_no_hotter_than_the_others_changes_nothing(self, engine):
        plain = Sampling(max_new_tokens=12, temperature=0.7)
        assert plain.fire is None
        same = dataclasses.replace(plain, fire=FIRE(temperature=0.7, top_k=64))
        one, other = (engine.generate([prompt(4), prompt(9)], each, [range(5), [7]]) for each in (plain, same))
        assert [group[0].token_ids[0] for group in one] == [group[0].token_ids[0] for group in other]
        if self.one_stream:
            assert ids_of(one) == ids_of(other)
            for a, b in zip(one[0], other[0]):
                assert torch.allclose(a.log_probs, b.log_probs, atol=self.tolerance)

    # Seeds and order

    @pytest.mark.parametrize("fire", [None, FIRE()], ids=str)
    def test_a_response_is_the_same_alone_in_a_batch_and_in_another_order(self, engine, fire):
        sampling = Sampling(max_new_tokens=12, fire=fire)
        prompts = [prompt(length, first=length) for length in (4, 17, 9, 1)]
        seeds = [[10, 11, 12], [20], [30, 31], [40, 41]]
        together = engine.generate(prompts, sampling, seeds)
        alone = [
            [engine.generate([asked], sampling, [[seed]])[0][0] for seed in own] for asked, own in zip(prompts, seeds)
        ]
        reversed_ = engine.generate(prompts[::-1], sampling, [own[::-1] for own in seeds[::-1]])
        assert ids_of(together) == ids_of(alone) == [group[::-1] for group in ids_of(reversed_)[::-1]]
        for batched, single in zip(together[1], alone[1]):
            assert torch.allclose(batched.log_probs, single.log_probs, atol=self.tolerance)
        assert [[response.seed for response in group] for group in together] == seeds

    def test_seeds_decide(self, engine):
        sampling = Sampling(max_new_tokens=12)
        first, same, other = engine.generate([prompt(4)], sampling, [[1, 1, 2]])[0]
        assert first.token_ids.tolist() == same.token_ids.tolist() != other.token_ids.tolist()

    def test_a_longer_limit_continues_the_same_response(self, engine):
        short, long = (
            engine.generate([prompt(4)], Sampling(max_new_tokens=limit), [[3]])[0][0].token_ids.tolist()
            for limit in (4, 40)
        )
        assert long[: len(short)] == short

    def test_no_prompts_and_no_seeds_give_empty_lists(self, engine):
        assert engine.generate([], Sampling(max_new_tokens=2), []) == []
        groups = engine.generate([prompt(3), prompt(4)], Sampling(max_new_tokens=2), [[], [1]])
        assert [len(group) for group in groups] == [0, 1]
        assert engine.generate([prompt(3)], Sampling(max_new_tokens=2), [[]]) == [[]]

    def test_no_sequences_give_no_scores_and_one_token_an_empty_one(self, engine):
        assert engine.score([]) == []
        assert [score.shape for score in engine.score([torch.tensor([3])])] == [(0,)]

    def test_the_processs_random_state_is_left_alone(self, engine):
        before = torch.get_rng_state()
        engine.generate([prompt(3)], Sampling(max_new_tokens=3), [[1, 2]])
        engine.score([prompt(3).token_ids])
        assert torch.equal(torch.get_rng_state(), before)

    # Ends

    def test_every_response_ends_at_its_stop_or_its_length_with_nothing_behind(self, engine):
        group = engine.generate([prompt(4)], Sampling(max_new_tokens=24, stop_token_ids=(7, 20)), [range(80)])[0]
        reasons = {response.finish_reason for response in group}
        for response in group:
            ids = response.token_ids.tolist()
            stops = [token in (1, 7, 20) for token in ids]
            assert response.log_probs.shape == response.token_ids.shape
            assert not any(stops[:-1])
            assert response.finish_reason == ("stop" if stops[-1] else "length")
            assert stops[-1] or len(ids) == 24
            assert response.text == text_of(ids)
        assert reasons == {"stop", "length"}

    def test_a_stop_string_across_tokens_ends_the_response_with_the_token_that_completes_it(self, engine):
        free = self._without_stop(engine)
        ids, decode = free.token_ids.tolist(), world().tokenizer.decode
        stop = decode(ids[5:8])[:-1] if len(decode(ids[7:8])) > 1 else decode(ids[5:8])
        at = next(end for end in range(1, len(ids)) if stop in decode(ids[:end], skip_special_tokens=True))
        stopped = engine.generate([prompt(4)], Sampling(max_new_tokens=24, stop=("never", stop)), [[free.seed]])[0][0]
        assert stopped.token_ids.tolist() == ids[:at]
        assert stopped.finish_reason == "stop"
        assert stopped.text == free.text[: free.text.index(stop)]
        assert torch.allclose(stopped.log_probs, free.log_probs[:at], atol=self.tolerance)

    def test_a_stop_string_in_one_response_does_not_end_the_others(self, engine):
        groups = engine.generate([prompt(4)], Sampling(max_new_tokens=16, stop=("ab", "e", "##")), [range(30)])[0]
        for response in groups:
            text = text_of(response.token_ids.tolist())
            found = any(stop in text for stop in ("ab", "e", "##"))
            assert not any(stop in response.text for stop in ("ab", "e", "##"))
            assert found or response.finish_reason == "length" or response.token_ids[-1] == 1
        assert {response.finish_reason for response in groups} == {"stop", "length"}

    def test_a_stop_string_in_the_prompt_ends_nothing(self, engine):
        asked = Prompt("stops", torch.tensor(world().tokenizer.convert_tokens_to_ids(["##", "a", "##"])), "##a##")
        free = engine.generate([asked], Sampling(max_new_tokens=3), [[9]])[0][0]
        assert "##a##" not in free.text
        stopped = engine.generate([asked], Sampling(max_new_tokens=3, stop=("##a##",)), [[9]])[0][0]
        assert stopped.token_ids.tolist() == free.token_ids.tolist()

    # Refusals

    def test_an_empty_prompt_is_refused_by_name(self, engine):
        with pytest.raises(ValueError, match="hollow"):
            engine.generate(
                [prompt(3), Prompt("hollow", torch.zeros(0, dtype=torch.int64), "")],
                Sampling(max_new_tokens=2),
                [[1], [2]],
            )

    def test_what_exceeds_the_context_is_refused_by_name_with_the_numbers(self, engine):
        fits = engine.generate([prompt(100)], Sampling(max_new_tokens=28), [[1]])[0][0]
        assert len(fits.token_ids) <= 28
        with pytest.raises(ValueError, match=r"(?s)wordy.*100.*29.*128"):
            engine.generate([prompt(3), prompt(100, "wordy")], Sampling(max_new_tokens=29), [[1], [2]])

    def test_seeds_must_come_per_prompt(self, engine):
        with pytest.raises(ValueError, match="2 prompts"):
            engine.generate([prompt(3), prompt(4)], Sampling(max_new_tokens=2), [[1]])

    # Sleep

    def test_asleep_it_refuses_and_after_level_1_it_goes_on_as_before(self, engine):
        sampling = Sampling(max_new_tokens=8)
        before = engine.generate([prompt(4)], sampling, [[1, 2]])
        prints = engine.fingerprint(["lm_head.weight", "model.norm.weight"])
        engine.sleep(1)
        with pytest.raises(EngineError, match="wake"):
            engine.generate([prompt(4)], sampling, [[1]])
        with pytest.raises(EngineError, match="wake"):
            engine.update_weights(world().weights(), 1)
        engine.wake(("weights",))
        assert engine.fingerprint(list(prints)) == prints
        with pytest.raises(EngineError, match="wake"):
            engine.generate([prompt(4)], sampling, [[1]])
        engine.wake(("cache",))
        assert engine.weight_version == 0
        assert ids_of(engine.generate([prompt(4)], sampling, [[1, 2]])) == ids_of(before)

    def test_after_level_2_a_full_push_must_follow_waking(self, engine):
        sampling = Sampling(max_new_tokens=8)
        before = engine.generate([prompt(4)], sampling, [[1, 2]])
        engine.sleep(2)
        assert engine.weight_version == -1
        engine.wake(("weights",))
        engine.wake(("cache",))
        with pytest.raises(EngineError, match="push"):
            engine.generate([prompt(4)], sampling, [[1]])
        with pytest.raises(EngineError):
            engine.update_weights(world().weights()[:3], 5)
        engine.update_weights(world().weights(), 6)
        assert ids_of(engine.generate([prompt(4)], sampling, [[1, 2]])) == ids_of(before)

    def test_waking_twice_and_sleeping_deeper_are_allowed(self, engine):
        engine.wake()
        engine.sleep(1)
        engine.sleep(2)
        engine.wake()
        engine.update_weights(world().weights(), 9)
        assert engine.weight_version == 9

    def test_closing_twice_is_allowed_and_ends_all_service(self, started):
        engine = started(last=True)
        engine.close()
        engine.close()
        for use in (
            lambda: engine.generate([prompt(3)], Sampling(max_new_tokens=2), [[1]]),
            lambda: engine.update_weights(world().weights(), 1),
            lambda: engine.fingerprint(["lm_head.weight"]),
            lambda: engine.wake(),
        ):
            with pytest.raises(EngineError, match="closed"):
                use()

    def _without_stop(self, engine: Engine) -> Response:
        group = engine.generate([prompt(4)], Sampling(max_new_tokens=24), [range(30)])[0]
        ordinary = set(world().tokenizer.convert_tokens_to_ids(list(PIECES)))
        return next(r for r in group if len(r.token_ids) > 10 and ordinary >= set(r.token_ids.tolist()[5:8]))
