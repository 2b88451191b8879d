"""An adapter pushed alone: the engine computes what the merged weights would, and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from lightrft.engines import Engine, EngineError, EngineGroup, TransformersEngine
from lightrft.ops import fingerprint

from .contract import prompt, world

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")
RANK, SCALING = 3, 1.5


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for layer in LAYERS:
        outputs, inputs = dict(world().weights())[f"{layer}.weight"].shape
        found[f"{layer}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) / 10
        found[f"{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) / 10
    return found


def merged() -> list[tuple[str, Tensor]]:
    pushed, weights = matrices(), dict(world().weights())
    for layer in LAYERS:
        delta = pushed[f"{layer}.lora_B.weight"] @ pushed[f"{layer}.lora_A.weight"]
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + SCALING * delta
    return list(weights.items())


def started(weights: list[tuple[str, Tensor]], dtype: Any = None) -> TransformersEngine:
    engine = TransformersEngine(dtype)
    engine.start(world().config, world().tokenizer, torch.device("cpu"))
    engine.update_weights(weights, 0)
    return engine


def scores(engine: Engine) -> Tensor:
    return torch.cat(engine.score([prompt(20).token_ids, prompt(7).token_ids]))


@pytest.fixture
def engine() -> Iterator[TransformersEngine]:
    engine = started(world().weights())
    yield engine
    engine.close()


def test_it_computes_what_merged_weights_would(engine: TransformersEngine) -> None:
    base = scores(engine)
    engine.update_adapter(SCALING, matrices().items(), 4)
    assert engine.weight_version == 4
    assert torch.allclose(scores(engine), scores(started(merged())), atol=1e-5)
    assert (scores(engine) - base).abs().max() > 0.01
    names = list(matrices())
    assert engine.fingerprint(names) == {name: fingerprint(tensor) for name, tensor in matrices().items()}


def test_in_half_precision_it_is_as_near_to_the_exact_sum_as_merged_weights_are() -> None:
    exact = scores(started(merged()))
    beside = started(world().weights(), "bfloat16")
    beside.update_adapter(SCALING, matrices().items(), 1)
    off, off_merged = ((scores(one) - exact).abs().mean() for one in (beside, started(merged(), "bfloat16")))
    assert off < 1.5 * off_merged < 0.2


def test_another_takes_its_place_and_pushed_weights_take_it_off(engine: TransformersEngine) -> None:
    base = scores(engine)
    engine.update_adapter(SCALING, matrices().items(), 1)
    few = {name: tensor for name, tensor in matrices().items() if name.startswith(LAYERS[0])}
    engine.update_adapter(SCALING, few.items(), 2)
    assert not torch.equal(scores(engine), base)
    with pytest.raises(EngineError, match=r"lm_head\.lora_A\.weight"):
        engine.fingerprint(["lm_head.lora_A.weight"])
    engine.update_weights([], 3)
    assert torch.equal(scores(engine), base)


def test_it_sleeps_with_the_weights_and_is_dropped_with_them(engine: TransformersEngine) -> None:
    engine.update_adapter(SCALING, matrices().items(), 1)
    with_adapter = scores(engine)
    engine.sleep(1)
    engine.wake()
    assert torch.equal(scores(engine), with_adapter)
    engine.sleep(2)
    engine.wake()
    with pytest.raises(EngineError, match="push all of them"):
        engine.update_adapter(SCALING, matrices().items(), 2)
    engine.update_weights(world().weights(), 2)
    assert not torch.equal(scores(engine), with_adapter)
    engine.update_adapter(SCALING, matrices().items(), 2)
    assert torch.equal(scores(engine), with_adapter)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 128)}, r"no linear layer 'model\.layers\.7\.mlp"),
        ({"model.embed_tokens.lora_A.weight": torch.ones(3, 64)}, r"no linear layer 'model\.embed_tokens' .* merged"),
        ({f"{LAYERS[0]}.weight": torch.ones(3, 64)}, "no linear layer"),
        ({f"{LAYERS[0]}.lora_B.weight": None}, rf"Of the adapter of {LAYERS[0]}, lora_B was not pushed"),
        (
            {f"{LAYERS[0]}.lora_B.weight": torch.ones(128, 4)},
            r"\(3, 128\) and \(128, 4\), but the layer has 128 in",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_no_usable_weights(
    engine: TransformersEngine, changed: dict[str, Tensor | None], says: str
) -> None:
    pushed = {name: tensor for name, tensor in (matrices() | changed).items() if tensor is not None}
    with pytest.raises(EngineError, match=says):
        engine.update_adapter(SCALING, pushed.items(), 1)
    with pytest.raises(EngineError, match="push all of them"):
        scores(engine)


def test_engines_take_no_adapters_unless_they_say_so() -> None:
    with pytest.raises(EngineError, match="Engine takes no adapters; set WeightSync's lora to merged"):
        Engine().update_adapter(1.0, [], 0)


def _over_two_ranks() -> str:
    torch.distributed.init_process_group("gloo")
    engine = TransformersEngine(tensor_parallel_size=2)
    engine.start(world().config, world().tokenizer, torch.device("cpu"), EngineGroup(2))
    engine.update_weights(world().weights(), 0)
    with pytest.raises(EngineError) as caught:
        engine.update_adapter(SCALING, matrices().items(), 1)
    return str(caught.value)


def test_an_engine_over_ranks_takes_none() -> None:
    assert all("over 2 ranks takes no adapters" in message for message in on_ranks(2, _over_two_ranks))
