"""What any strategy writes, any other reads, on another number of ranks, bit by bit; and nothing is changed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from strategies.test_sharding import launched, new_actor, train_step
from trainer import tiny_run

from lightrft.lightning_modules.pretrained import LoRA
from lightrft.strategies import state

LORA = LoRA(rank=4, alpha=8.0)
# Each reads what the one before it wrote.
CHAIN = [("ddp", 1), ("fsdp2", 4), ("zero1", 2), ("fsdp2_offload", 2), ("zero3", 2), ("zero2", 1), ("ddp", 2)]


def _pass_on(inputs: str, strategy: str, ranks: int, lora: bool, precision: str, source: str | None, to: str) -> None:
    """Write a state to ``to``: that of two steps, or what was read from ``source``."""
    _, sharding = launched(strategy, precision, ranks)
    options: dict[str, Any] = {"lora": LORA} if lora else {}
    actor = new_actor(inputs, seed=0 if source is None else 1, **options)
    optimizer = torch.optim.AdamW([p for p in actor.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
    module, stepped = sharding.setup(actor, optimizer)
    if source is None:
        for group in stepped.param_groups:
            group["lr"] = 3e-3  # as a schedule would
        for _ in range(2):
            train_step(sharding, module, stepped)
    else:
        sharding.load(Path(source), module, stepped)
    _write(sharding, module, stepped, Path(to))


def _write(sharding: Any, module: Any, optimizer: Any, folder: Path) -> None:
    group = torch.distributed.group.WORLD if sharding.fabric.world_size > 1 else None
    if sharding.fabric.is_global_zero:
        folder.mkdir()
    sharding.fabric.barrier()
    state.write(folder, sharding.snapshot(module, optimizer), group)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.write_inputs(tmp_path_factory.mktemp("inputs")))


def ours(folder: Path) -> dict[str, Any]:
    """But for what is DeepSpeed's alone: counters, and values of groups that only its optimizers know."""
    return {name: value for name, value in tiny_run.saved_state(folder).items() if not name.startswith("engine.")}


@pytest.mark.parametrize("lora", [False, True])
def test_a_state_goes_through_every_strategy_unchanged(inputs: str, tmp_path: Path, lora: bool) -> None:
    source: Path | None = None
    first: dict[str, Any] = {}
    for number, (strategy, ranks) in enumerate(CHAIN):
        to = tmp_path / f"{number}-{strategy}"
        on_ranks(ranks, _pass_on, inputs, strategy, ranks, lora, "32-true", source and str(source), str(to))
        first = first or ours(to)
        assert tiny_run.differences(first, ours(to)) == [], strategy
        source = to
    trained = {name.rpartition(".")[0] for name in first if name.startswith(state.STATE)}
    assert all(".lora_" in name for name in trained) == lora
    assert not any("lm_head" in name for name in first)  # tied: once
    assert {value for name, value in first.items() if name.endswith(".lr")} == {3e-3}
    assert {float(value) for name, value in first.items() if name.endswith(".step")} == {2.0}


@pytest.mark.parametrize("chain", [("zero1", "zero3", "ddp"), ("fsdp2", "zero2", "fsdp2")])
def test_master_weights_are_kept_whole_in_bfloat16(inputs: str, tmp_path: Path, chain: tuple[str, ...]) -> None:
    source: Path | None = None
    for strategy in chain:
        to = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        on_ranks(2, _pass_on, inputs, strategy, 2, False, "bf16-mixed", source and str(source), str(to))
        weights = tiny_run.saved_weights(to)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())
        if source is not None:
            assert tiny_run.differences(ours(source), ours(to)) == [], strategy
        source = to


def _scaled(inputs: str, strategy: str, source: str | None, to: str) -> float:
    _, sharding = launched(strategy, "16-mixed")
    actor = new_actor(inputs)
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(actor.parameters(), lr=1e-2))
    if source is None:
        sharding.precision.load_state_dict({"scale": 1024.0, "finite_steps": 7})
    else:
        sharding.load(Path(source), module, optimizer)
    _write(sharding, module, optimizer, Path(to))
    return sharding.precision.state_dict()["scale"]


def test_the_loss_scale_is_part_of_it(inputs: str, tmp_path: Path) -> None:
    on_ranks(2, _scaled, inputs, "ddp", None, str(tmp_path / "ddp"))
    assert on_ranks(2, _scaled, inputs, "fsdp2", str(tmp_path / "ddp"), str(tmp_path / "fsdp2")) == [1024.0] * 2
    assert tiny_run.saved_state(tmp_path / "fsdp2")["scaler.finite_steps"] == 7


def _fresh(inputs: str, strategy: str, to: str) -> tuple[bool, int, int]:
    _, sharding = launched(strategy)
    actor = new_actor(inputs)
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(actor.parameters(), lr=1e-2))
    part = sharding.snapshot(module, optimizer)
    tensors = [value for value in part.values() if isinstance(value, torch.Tensor)]
    held = sum((value.to_local() if hasattr(value, "to_local") else value).nbytes for value in tensors)
    _write(sharding, module, optimizer, Path(to))
    return (
        any(name.startswith(state.STATE) for name in part),
        held,
        sum(p.nbytes for p in new_actor(inputs).parameters()),
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_an_optimizer_that_has_not_stepped_stays_so_and_no_rank_holds_the_whole(
    inputs: str, tmp_path: Path, strategy: str
) -> None:
    for stepped, held, whole in on_ranks(2, _fresh, inputs, strategy, str(tmp_path / strategy)):
        assert not stepped
        assert held == pytest.approx(whole / 2, rel=0.1)


def _refused(inputs: str, strategy: str, source: str) -> str:
    _, sharding = launched(strategy)
    actor = new_actor(inputs, config={**tiny_run.QWEN2, "num_hidden_layers": 3})
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(actor.parameters(), lr=1e-2))
    with pytest.raises(ValueError) as caught:
        sharding.load(Path(source), module, optimizer)
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_another_model_is_refused(inputs: str, tmp_path: Path, strategy: str) -> None:
    on_ranks(1, _pass_on, inputs, "ddp", 1, False, "32-true", None, str(tmp_path / "ddp"))
    for message in on_ranks(2, _refused, inputs, strategy, str(tmp_path / "ddp")):
        assert message.startswith("12 weights are missing, 'language_model.model.layers.2.")
