"""Engines that lie over several ranks: the tokens, weights and fingerprints of one that does not, and no rank waits."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lightrft.engines import EngineError, EngineGroup, TransformersEngine
from lightrft.ops.fingerprint import Fingerprint, fingerprint
from lightrft.samples import Sampling

from .contract import ids_of, prompt, world

CPU = torch.device("cpu")
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 96}
SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "eos_token_id": 1, "pad_token_id": 0, "dtype": "float32", **HEADS}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen2, tied": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "norms of heads": lambda: Qwen3Config(**SMALL, head_dim=16),
    "scaled embedding": lambda: Gemma2Config(**SMALL, head_dim=16, sliding_window=6),
    "norms over heads": lambda: Olmo2Config(**SMALL),
    "fused layers": lambda: Phi3Config(**SMALL),
    "biases": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
}
SAMPLING = Sampling(max_new_tokens=10, temperature=1.1, stop=("ab", "e"))
PROMPTS, SEEDS = [prompt(7), prompt(1), prompt(12)], [[1, 2, 3], [4], [5, 6]]


def model_of(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def started(config: Any, group: EngineGroup | None = None, **options: Any) -> TransformersEngine:
    group = group or EngineGroup()
    engine = TransformersEngine(tensor_parallel_size=group.size, **options)
    engine.start(config, world().tokenizer, CPU, group)
    return engine


def joined_ranks(size: int) -> EngineGroup:
    """All ranks are one group."""
    dist.init_process_group("gloo")
    return EngineGroup(size)


def what_it_does(engine: TransformersEngine, model: Any) -> dict[str, Any]:
    """Tokens and log-probs, scores, fingerprints; after a second push and each kind of sleep too."""
    weights = list(model.state_dict().items())
    names = [name for name, _ in weights]
    engine.update_weights(weights, 0)
    found: dict[str, Any] = {"prints": engine.fingerprint(names)}
    groups = engine.generate(PROMPTS, SAMPLING, SEEDS)
    found["tokens"] = ids_of(groups)
    found["log_probs"] = [response.log_probs.tolist() for group in groups for response in group]
    found["texts"] = [response.text for group in groups for response in group]
    found["scores"] = [score.tolist() for score in engine.score([asked.token_ids for asked in PROMPTS])]
    engine.sleep(1)
    engine.wake()
    found["prints after sleep"] = engine.fingerprint(names)
    engine.sleep(2)
    engine.wake()
    engine.update_weights([(name, tensor * 1.1) for name, tensor in weights], 1)
    found["tokens of the second push"] = ids_of(engine.generate(PROMPTS, SAMPLING, SEEDS))
    found["elements held"] = sum(weight.numel() for weight in engine._model.parameters())
    return found


def on_a_group(size: int, name: str) -> dict[str, Any]:
    config = CONFIGS[name]()
    return what_it_does(started(config, joined_ranks(size)), model_of(config))


def close(one: list[list[float]], other: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("size", "name"), [*((2, name) for name in CONFIGS), (4, "qwen2, tied")])
def test_a_group_samples_scores_and_holds_what_one_rank_does(size: int, name: str) -> None:
    config = CONFIGS[name]()
    model = model_of(config)
    alone = what_it_does(started(config), model)
    assert alone["prints"] == {key: fingerprint(tensor) for key, tensor in model.state_dict().items()}
    for rank in ranks.on_ranks(size, on_a_group, size, name):
        assert close(rank.pop("log_probs"), alone["log_probs"]) and close(rank.pop("scores"), alone["scores"])
        assert rank.pop("elements held") < alone["elements held"] / size * 1.5
        assert rank == {key: alone[key] for key in rank}
        prints = rank["prints"]
        assert all(prints[key].difference(print_) < 1e-9 for key, print_ in alone["prints"].items())


def the_contract() -> tuple[int, str]:
    """Exit code and report of the contract's tests, which this rank runs in step with the others."""
    joined_ranks(2)
    file = Path(__file__).with_name("group_contract.py")
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)])
    return int(code), report.getvalue()


def test_the_contract_of_every_engine_holds_on_a_group() -> None:
    for code, report in ranks.on_ranks(2, the_contract):
        assert code == 0 and " passed" in report, report


# Refusals


def refusal(size: int, name: str) -> str:
    with pytest.raises(EngineError) as caught:
        started(REFUSED[name](), joined_ranks(size))
    return str(caught.value)


REFUSED: dict[str, Callable[[], Any]] = {
    "heads": lambda: Qwen2Config(**SMALL | {"num_key_value_heads": 2, "intermediate_size": 90}),
    "no plan": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "experts": lambda: Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize(
    ("size", "name", "says"),
    [
        (4, "heads", "tensor_parallel_size=4 does not divide the model's num_key_value_heads=2, intermediate_size=90;"),
        (2, "no plan", "no plan to split GPT2LMHeadModel"),
        (2, "experts", "splits model.layers.0.mlp.experts of Qwen3MoeForCausalLM as 'moe_tp_experts'"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_with_the_numbers(size: int, name: str, says: str) -> None:
    assert all(says in message for message in ranks.on_ranks(size, refusal, size, name))


def no_group() -> str:
    dist.init_process_group("gloo")
    with pytest.raises(EngineError) as caught:
        EngineGroup(2)
    return str(caught.value)


def test_ranks_that_cannot_be_divided_into_groups_are_refused_with_the_numbers() -> None:
    says = "tensor_parallel_size=2 lies over 2 ranks, and this run's"
    assert all(f"{says} 3 " in message for message in ranks.on_ranks(3, no_group))
    with pytest.raises(EngineError, match=f"{says} 1 "):
        EngineGroup(2)
    with pytest.raises(EngineError, match=r"tensor_parallel_size=2, but was started on a group of 1"):
        TransformersEngine(tensor_parallel_size=2).start(CONFIGS["qwen2"](), world().tokenizer, CPU)


# Ranks that differ


def with_other_scores() -> list[list[list[int]]]:
    """Tokens of a rank whose logits are its own."""
    engine = started(CONFIGS["qwen2"](), joined_ranks(2))
    engine.update_weights(list(model_of(CONFIGS["qwen2"]()).state_dict().items()), 0)
    off = dist.get_rank() * torch.arange(64) / 8

    def shift(module: Any, args: Any, output: Any) -> None:
        output.logits += off

    engine._model.register_forward_hook(shift)
    return ids_of(engine.generate(PROMPTS, SAMPLING, SEEDS))


def test_ranks_whose_logits_differ_draw_the_same_tokens_and_stop_together() -> None:
    first, second = ranks.on_ranks(2, with_other_scores)
    assert first == second


def with_one_part_stale(rank: int, name: str) -> tuple[dict[str, Fingerprint], Fingerprint]:
    """Fingerprints after a push of which ``rank`` misses ``name``; and what was pushed."""
    engine = started(CONFIGS["qwen2"](), joined_ranks(2))
    weights = list(model_of(CONFIGS["qwen2"]()).state_dict().items())
    engine.update_weights(weights, 0)
    new = dict(weights)[name] + 1e-6
    engine.update_weights([] if dist.get_rank() == rank else [(name, new)], 1)
    return engine.fingerprint([name]), fingerprint(new)


def test_a_part_that_is_stale_on_one_rank_is_seen_on_all() -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    for held, pushed in ranks.on_ranks(2, with_one_part_stale, 1, name):
        assert held[name] != pushed and held[name].numel == pushed.numel
