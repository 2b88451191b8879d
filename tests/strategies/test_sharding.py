"""The surface on real ranks: what it shards, skips, loads and says, the same under every strategy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from trainer import tiny_run

from lightrft.lightning_modules import ActorModule
from lightrft.lightning_modules.pretrained import LoRA
from lightrft.ops import pack
from lightrft.strategies import FSDP2, Sharding, make_fabric, sharding_of

NAMES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.write_inputs(tmp_path_factory.mktemp("inputs")))


def launched(strategy: Any, precision: str = "32-true", devices: int = 2) -> tuple[Fabric, Sharding]:
    fabric = make_fabric(strategy, precision, accelerator="cpu", devices=devices)
    fabric.launch()
    return fabric, sharding_of(fabric)


def new_actor(inputs: str, seed: int = 0, **options: Any) -> ActorModule:
    torch.manual_seed(seed)
    actor = tiny_run.actor(Path(inputs), **options)
    actor.configure_model()
    return actor


def exported(actor: ActorModule) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in actor.export_parameters()}


def loss_of(module: Any, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    sequences = list(torch.randint(2, 14, (3, 9), generator=generator))
    packed = pack(sequences, torch.ones(3, dtype=torch.int64), torch.ones(3, 8, dtype=torch.bool))
    log_probs, _ = module(*packed.inputs)
    return -log_probs.mean()


def train_step(sharding: Sharding, module: Any, optimizer: Any, scale: float = 1.0, clip: float | None = None) -> float:
    with sharding.accumulate(module, last=True):
        sharding.backward(module, loss_of(module, sharding.fabric.global_rank) * scale)
    return sharding.step(module, optimizer, clip)


# --- a step that is not finite ---------------------------------------------------------------------------------------


def _skipped(inputs: str, name: str) -> tuple[bool, list[bool], bool]:
    fabric, sharding = launched(name)
    actor = new_actor(inputs)
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(actor.parameters(), lr=1e-2))
    weights = [exported(actor)]
    # Of one rank alone: the others must skip with it.
    train_step(sharding, module, optimizer, scale=math.inf if fabric.global_rank else 1.0)
    norms = [train_step(sharding, module, optimizer, scale=math.nan if fabric.global_rank else 1.0)]
    weights.append(exported(actor))
    norms.append(train_step(sharding, module, optimizer))
    weights.append(exported(actor))
    same = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    return (
        same,
        [math.isfinite(norm) for norm in norms],
        any(not torch.equal(weights[1][key], weights[2][key]) for key in weights[0]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(inputs: str, name: str) -> None:
    assert on_ranks(2, _skipped, inputs, name) == [(True, [False, True], True)] * 2


# --- clipping --------------------------------------------------------------------------------------------------------


def _clipped(inputs: str, name: str) -> tuple[float, float]:
    _, sharding = launched(name)
    actor = new_actor(inputs)
    before = exported(actor)
    module, optimizer = sharding.setup(actor, torch.optim.SGD(actor.parameters(), lr=1.0))
    norm = train_step(sharding, module, optimizer, clip=0.01)
    after = dict(actor.export_parameters())
    moved = torch.stack([(after[key] - before[key]).square().sum() for key in before]).sum().sqrt()
    return norm, float(moved)


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_is_of_the_whole_gradient_and_clips_it(inputs: str, name: str) -> None:
    norm, moved = on_ranks(2, _clipped, inputs, name)[1]
    assert norm == pytest.approx(on_ranks(2, _clipped, inputs, "ddp")[0][0], rel=1e-5)
    assert moved == pytest.approx(0.01, rel=1e-3)


# --- what is computed again, and in pieces ----------------------------------------------------------------------------


def _checkpointed(inputs: str, name: str, checkpointing: bool) -> tuple[float, dict[str, Tensor]]:
    _, sharding = launched(name)
    actor = new_actor(inputs, gradient_checkpointing=checkpointing)
    module, optimizer = sharding.setup(actor, torch.optim.SGD(actor.parameters(), lr=1.0))
    module.train()
    return train_step(sharding, module, optimizer), exported(actor)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_gradient_checkpointing_changes_no_step(inputs: str, name: str) -> None:
    expected, plain = on_ranks(2, _checkpointed, inputs, "ddp", False)[0]
    norm, weights = on_ranks(2, _checkpointed, inputs, name, True)[0]
    assert norm == pytest.approx(expected, rel=1e-5)
    for key, weight in plain.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-5)


def _in_pieces(inputs: str, name: str) -> tuple[float, dict[str, Tensor]]:
    fabric, sharding = launched(name)
    actor = new_actor(inputs)
    actor.head_chunk_tokens = 2 if fabric.global_rank else 50  # many pieces on one rank, one on the other
    module, optimizer = sharding.setup(actor, torch.optim.SGD(actor.parameters(), lr=1.0))
    return train_step(sharding, module, optimizer), exported(actor)


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_ranks_may_need_other_numbers_of_pieces_of_the_head(inputs: str, name: str) -> None:
    norm, weights = on_ranks(2, _in_pieces, inputs, name)[0]
    expected, whole_weights = on_ranks(2, _in_pieces, inputs, "ddp")[0]
    assert norm == pytest.approx(expected, rel=1e-5)
    for key, weight in whole_weights.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-5)


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def _sharded(inputs: str, tied: bool) -> dict[str, tuple[bool, int]]:
    _, sharding = launched("fsdp2")
    actor = new_actor(inputs, config={**tiny_run.QWEN2, "tie_word_embeddings": tied})
    sharding.setup(actor, torch.optim.AdamW(actor.parameters()))
    return {
        name: (isinstance(parameter, DTensor), parameter.to_local().numel() if isinstance(parameter, DTensor) else -1)
        for name, parameter in actor.named_parameters()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_lies_divided_over_ranks(inputs: str, tied: bool) -> None:
    whole = {name: parameter.numel() for name, parameter in new_actor(inputs).named_parameters()}
    one, two = on_ranks(2, _sharded, inputs, tied)
    for name, numel in whole.items():
        assert one[name][0] and 0.4 <= one[name][1] / numel <= 0.6
        assert one[name][1] + two[name][1] == numel


def _loaded_on_rank_0(inputs: str, lora: bool) -> tuple[list[bool], dict[str, Tensor], list[float]]:
    fabric, sharding = launched("fsdp2")
    with sharding.building():
        # Fresh weights of another seed on each rank: all must get those of rank 0.
        actor = new_actor(inputs, seed=fabric.global_rank, **({"lora": LoRA(rank=2)} if lora else {}))
        twin = actor.frozen_copy()
    on_meta = [parameter.is_meta for parameter in actor.parameters()]
    trained = [parameter for parameter in actor.parameters() if parameter.requires_grad]
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(trained, lr=1e-2))
    reference = sharding.setup_frozen(twin)
    losses = [float(loss_of(reference)), float(loss_of(module).detach())]
    train_step(sharding, module, optimizer)
    losses.append(float(loss_of(reference)))
    return on_meta, dict(actor.export_parameters()), losses


@pytest.mark.parametrize("lora", [False, True])
def test_rank_0_loads_and_the_others_get_their_shards(inputs: str, lora: bool) -> None:
    one, two = on_ranks(2, _loaded_on_rank_0, inputs, lora)
    assert not any(one[0]) and all(two[0])
    alone = new_actor(inputs, **({"lora": LoRA(rank=2)} if lora else {}))
    assert one[2] == two[2] == [pytest.approx(float(loss_of(alone)), abs=1e-6)] * 3
    for name, weight in one[1].items():
        torch.testing.assert_close(two[1][name], weight, rtol=0, atol=0)


def _hybrid(inputs: str) -> list[tuple[int, ...]]:
    _, sharding = launched(FSDP2(replicas=2), devices=4)
    actor = new_actor(inputs)
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(actor.parameters()))
    train_step(sharding, module, optimizer)
    first = next(iter(actor.parameters()))
    return [tuple(first.device_mesh.mesh.shape), tuple(first.to_local().shape)]


def test_replicas_shard_over_the_ranks_of_one_copy(inputs: str) -> None:
    assert on_ranks(4, _hybrid, inputs) == [[(2, 2), (7, 32)]] * 4


def _too_many_replicas() -> None:
    launched(FSDP2(replicas=3))


def test_replicas_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"FSDP2\(replicas=3\) cannot share 2 ranks"):
        on_ranks(2, _too_many_replicas)


def _used_optimizer(inputs: str) -> None:
    _, sharding = launched("fsdp2")
    actor = new_actor(inputs)
    optimizer = torch.optim.AdamW(actor.parameters())
    loss_of(actor).backward()
    optimizer.step()
    sharding.setup(actor, optimizer)


def test_an_optimizer_that_has_stepped_is_refused(inputs: str) -> None:
    with pytest.raises(AssertionError, match="has not stepped yet"):
        on_ranks(2, _used_optimizer, inputs)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def _dtypes(inputs: str, name: str) -> tuple[set[torch.dtype], set[torch.dtype], torch.dtype]:
    _, sharding = launched(name, "bf16-mixed")
    actor = new_actor(inputs)
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(actor.parameters(), lr=1e-2))
    train_step(sharding, module, optimizer)
    stepped = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
    states = {value.dtype for state in stepped.state.values() for value in state.values() if value.ndim}
    masters = {parameter.dtype for group in stepped.param_groups for parameter in group["params"]}
    frequencies = next(buffer for key, buffer in actor.named_buffers() if key.endswith("inv_freq"))
    return states, masters, frequencies.dtype


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_steps_in_float32_and_keeps_rotary_frequencies(inputs: str, name: str) -> None:
    for states, masters, frequencies in on_ranks(2, _dtypes, inputs, name):
        assert states == {torch.float32} and masters <= {torch.float32} and frequencies == torch.float32


# --- failing together ------------------------------------------------------------------------------------------------


def _fails_on_one() -> str:
    fabric, sharding = launched("ddp")

    def work() -> None:
        if fabric.global_rank == 1:
            raise FileNotFoundError("no such folder")

    try:
        sharding.together(work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_what_fails_on_one_rank_fails_on_all() -> None:
    one, two = on_ranks(2, _fails_on_one)
    assert one == "RuntimeError: Rank 1 failed with FileNotFoundError: no such folder"
    assert two == "FileNotFoundError: no such folder"


# --- a strategy for each model ---------------------------------------------------------------------------------------


def _by_model(inputs: str, root: str) -> tuple[set[str], dict[str, Tensor]]:
    from lightrft.algorithms import Algorithm

    strategy = {"default": "fsdp2", "critic": "zero2", "reference": "ddp"}
    model = tiny_run.module(Path(inputs), Algorithm("ppo"))
    trainer = tiny_run.trainer(Path(root), model=model, devices=2, strategy=strategy)
    trainer.fit(model, tiny_run.data(Path(inputs)))
    models = {"actor": model.actor, "critic": model.critic, "reference": model.reference}
    sharded = {name for name, one in models.items() if any(isinstance(p, DTensor) for p in one.parameters())}
    return sharded, exported(model.actor)


def test_models_may_take_strategies_of_their_own(inputs: str, tmp_path: Path) -> None:
    from lightrft.algorithms import Algorithm

    sharded, weights = on_ranks(2, _by_model, inputs, str(tmp_path / "own"))[0]
    assert sharded == {"actor"}
    alone = tiny_run.fit(Path(inputs), tmp_path / "alone", model=tiny_run.module(Path(inputs), Algorithm("ppo")))
    for name, weight in tiny_run.weights(alone).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)
