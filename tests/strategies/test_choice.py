"""Names and objects of strategies: ours run, Fabric's own are refused with the one to take instead."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from typing import Any

import pytest
from lightning.fabric import Fabric
from lightning.fabric.strategies import (
    STRATEGY_REGISTRY,
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightrft.strategies import DDP, FSDP2, STRATEGIES, ScaledFloat16, ZeRO, by_role, make_fabric


def fabric(strategy: Any, precision: str = "32-true", devices: int = 2) -> Fabric:
    return make_fabric(strategy, precision, accelerator="cpu", devices=devices)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", DDP), ("fsdp2", FSDP2), ("zero1", ZeRO), ("zero2", ZeRO), ("zero3", ZeRO), ("auto", DDP)],
)
def test_a_name_is_one_of_our_classes(name: str, kind: type) -> None:
    assert type(fabric(name).strategy) is kind


def test_auto_on_one_device_needs_no_process_group() -> None:
    assert type(fabric("auto", devices=1).strategy) is SingleDeviceStrategy


def test_names_carry_their_stage_and_where_state_lies() -> None:
    for stage in (1, 2, 3):
        plain, offloaded = fabric(f"zero{stage}").strategy, fabric(f"zero{stage}_offload").strategy
        assert plain.config["zero_optimization"]["stage"] == plain.stage == stage
        assert offloaded.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        assert ("offload_param" in offloaded.config["zero_optimization"]) == (stage == 3)
    assert fabric("fsdp2_offload").strategy.cpu_offload and not fabric("fsdp2").strategy.cpu_offload


def test_fabric_itself_knows_our_names_and_keeps_its_own() -> None:
    assert isinstance(Fabric(accelerator="cpu", devices=2, strategy="fsdp2").strategy, FSDP2)
    assert Fabric(accelerator="cpu", devices=2, strategy="zero3").strategy.stage == 3
    assert set(STRATEGIES) <= set(STRATEGY_REGISTRY)
    assert STRATEGY_REGISTRY["ddp"]["strategy"] is DDPStrategy
    assert STRATEGY_REGISTRY["deepspeed"]["strategy"] is DeepSpeedStrategy


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        ("deepspeed", "zero2"),
        ("deepspeed_stage_1", "zero1"),
        ("deepspeed_stage_3_offload", "zero3_offload"),
        ("fsdp", "fsdp2"),
        ("fsdp_cpu_offload", "fsdp2_offload"),
        ("ddp_spawn", "ddp"),
        ("ddp_notebook", "ddp"),
        ("dp", "one of auto, ddp, fsdp2"),
        (DDPStrategy(), "ddp"),
        (ModelParallelStrategy(lambda module, mesh: module), "fsdp2"),
        (SingleDeviceStrategy(), "auto"),
    ],
)
def test_fabrics_own_is_refused_with_the_one_to_take(strategy: Any, instead: str) -> None:
    with pytest.raises(ValueError, match=f"use {instead}"):
        fabric(strategy)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("fsdp2", "64-true"), ("zero2", "64-true"), ("ddp", "16-true"), ("auto", "8"), ("fsdp2", "16-true")],
)
def test_a_precision_without_safe_steps_is_refused(strategy: str, precision: str) -> None:
    with pytest.raises(ValueError, match=f"precision='{precision}' is not supported under .*; use one of"):
        fabric(strategy, precision)


def test_float16_is_scaled_by_ours_or_by_deepspeed() -> None:
    assert isinstance(fabric("fsdp2", "16-mixed").strategy.precision, ScaledFloat16)
    assert isinstance(fabric("ddp", "16-mixed").strategy.precision, ScaledFloat16)
    assert isinstance(fabric("auto", "16-mixed", devices=1).strategy.precision, ScaledFloat16)
    assert not isinstance(fabric("zero2", "16-mixed").strategy.precision, ScaledFloat16)


@pytest.mark.parametrize("options", [{"stage": 4}, {"stage": 2, "hpz": 2}])
def test_zero_refuses_what_a_stage_has_not(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="stage"):
        ZeRO(**options)


@pytest.mark.parametrize(
    ("config", "instead"),
    [
        ({"gradient_clipping": 1.0}, "trainer.gradient_clip_val"),
        ({"bf16": {"enabled": True}}, "trainer.precision"),
        ({"zero_optimization": {"stage": 3}}, "stage"),
        ({"optimizer": {"type": "Adam"}}, "the module's optimizer"),
    ],
)
def test_zero_refuses_a_deepspeed_key_that_the_loop_decides(config: dict[str, Any], instead: str) -> None:
    with pytest.raises(ValueError, match=f"must not set .*; {instead} does"):
        ZeRO(stage=2, config=config)


def test_zero_takes_further_keys_of_deepspeed() -> None:
    config = ZeRO(stage=3, config={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}).config
    assert config["zero_optimization"]["reduce_bucket_size"] == 7 and config["wall_clock_breakdown"]


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightrft.strategies.zero as module

    def absent(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(module, "find_spec", absent)
    with pytest.raises(ImportError, match=r"pip install 'lightning-rft\[deepspeed\]'"):
        ZeRO()


def test_fsdp2_refuses_replicas_below_one() -> None:
    with pytest.raises(ValueError, match="replicas of at least 1"):
        FSDP2(replicas=0)


def test_a_role_that_no_model_has_is_refused() -> None:
    assert by_role("fsdp2") == ("fsdp2", {})
    assert by_role({"default": "fsdp2", "critic": "ddp"}) == ("fsdp2", {"critic": "ddp"})
    with pytest.raises(ValueError, match="'reward'; models are actor, critic, reference"):
        by_role({"default": "ddp", "reward": "ddp"})
    with pytest.raises(ValueError, match="needs default"):
        by_role({"critic": "ddp"})
