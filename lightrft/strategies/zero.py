"""DeepSpeed ZeRO 1, 2 and 3: optimizer states, gradients and weights divided over ranks by DeepSpeed's engine."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.strategies import DeepSpeedStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft.strategies import zero_state
from lightrft.strategies.placement import Part, Placement
from lightrft.strategies.process_group import TIMEOUT, backend_for
from lightrft.strategies.replicated import Replicated
from lightrft.strategies.state import State


class ZeRO(DeepSpeedStrategy):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) as a strategy of Fabric.

    Runs on gloo and CPUs as well. ``bf16-mixed`` keeps bfloat16 weights to compute with and float32 ones to step;
    ``16-mixed`` is DeepSpeed's loss scaler.

    Args:
        stage: 1 divides optimizer states, 2 gradients too, 3 weights too.
        offload: keep what the optimizer needs, and step, in host memory; in stage 3 the weights too.
        hpz: ranks that hold a copy of the weights together, so that a backward gathers them inside a node (ZeRO++,
            arXiv 2306.10209); 1 is none. Stage 3.
        config: further keys of DeepSpeed's configuration; those this loop decides are refused.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: another stage, ``hpz`` without stage 3, or a key of ``config`` that the loop decides.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: bool = False,
        hpz: int = 1,
        config: dict[str, Any] | None = None,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO has stages 1, 2 and 3, not {stage}.")
        if hpz != 1 and stage != 3:
            raise ValueError(
                f"ZeRO(hpz={hpz}) keeps copies of divided weights, which stage {stage} has not; use stage 3."
            )
        if not find_spec("deepspeed"):
            raise ImportError("ZeRO needs DeepSpeed: pip install 'lightning-rft[deepspeed]'.")
        _choose_accelerator()
        self.stage, self.offload = stage, offload
        super().__init__(config=_configuration(stage, offload, hpz, config or {}), timeout=TIMEOUT)
        self._backward_sync_control = _BackwardSync()

    def placement(self, ranks: int, precision: str) -> Placement:
        """How a model lies over ``ranks``, DeepSpeed's own defaults where the configuration is silent."""
        zero = cast(dict[str, Any], self.config)["zero_optimization"]
        size = _COMPUTE_DTYPES.get(precision, torch.float32).itemsize
        # Two of them where the reduction overlaps the backward; stage 3 has one.
        buckets = 2 if zero["overlap_comm"] and self.stage < 3 else 1
        parts: set[Part] = {"gradients", "optimizer"} if self.stage < 3 else {"weights", "gradients", "optimizer"}
        return Placement(
            weight_shards=ranks if self.stage == 3 else 1,
            gradient_shards=ranks if self.stage > 1 else 1,
            optimizer_shards=ranks,
            on_host=frozenset(parts if self.offload else ()),
            compute_bytes=size,
            casts_at_rest=True,
            gathers=self.stage == 3,
            gathered_parameters=int(zero.get("stage3_max_live_parameters", 1e9)),
            buffer_bytes=int(zero.get("reduce_bucket_size", 5e8)) * size * buckets,
        )

    def setup_environment(self) -> None:
        # Fabric's own wants CUDA; DeepSpeed does without.
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()

    def _setup_distributed(self) -> None:
        reset_seed()
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        if not self._config_initialized:
            self._format_config()
            self._config_initialized = True

    def _init_deepspeed_distributed(self) -> None:
        import deepspeed

        assert self.cluster_environment is not None
        self._set_node_environment_variables()
        self._process_group_backend = backend_for(self.root_device)
        device_id = self.root_device if self.root_device.type != "cpu" else None
        _init_dist_connection(
            self.cluster_environment, self._process_group_backend, timeout=self._timeout, device_id=device_id
        )
        # On a CPU it would first compile an operator that serves its inference alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)

    def _initialize_engine(self, model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None) -> Any:
        import deepspeed

        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        engine, stepped, _, scheduler = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
        _restore_buffers(model, buffers, self.root_device)
        return engine, stepped, scheduler


class DividedByZeRO(Replicated):
    """ZeRO behind the common surface."""

    @property
    def _stage(self) -> int:
        return cast(ZeRO, self.fabric.strategy).stage

    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        self._keep_in_step(module)
        return super().setup(module, optimizer)

    def _keep_in_step(self, module: Any) -> None:
        # Stage 3 gathers a weight whenever its layer is called: a head that works in pieces, for each of them.
        module.head_in_step = self._stage == 3

    def setup_frozen(self, module: nn.Module) -> Any:
        self._keep_in_step(module)
        if self._stage == 3:
            engine = self.fabric.strategy.setup_module(module)
            engine.eval()

            @torch.no_grad()
            def evaluate(*args: Any, **kwargs: Any) -> Any:
                return engine(*args, **kwargs)

            return evaluate
        return super().setup_frozen(module)

    def _placed(self, module: nn.Module) -> nn.Module:
        # As DeepSpeed does with what it trains.
        dtype = _COMPUTE_DTYPES.get(self.precision.precision)
        buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
        placed = self.fabric.to_device(module.to(dtype) if dtype else module)
        _restore_buffers(placed, buffers, self.fabric.device)
        return placed

    def accumulate(self, module: Any, last: bool) -> AbstractContextManager[None]:
        return self.fabric.no_backward_sync(module, enabled=not last)

    def step(self, module: Any, optimizer: Any, clip_norm: float | None) -> float:
        engine = module._forward_module
        engine.optimizer.clip_grad = clip_norm or 0.0
        optimizer.step()
        norm = float(engine.optimizer._global_grad_norm)
        return math.inf if engine.optimizer.overflow else norm

    def held_optimizer_state(self, module: Any, optimizer: Any) -> list[Tensor]:
        return zero_state.held_optimizer_state(module._forward_module)

    def snapshot(self, module: Any, optimizer: Any) -> State:
        return zero_state.snapshot(module._forward_module)

    def load(self, folder: Path, module: Any, optimizer: Any | None) -> None:
        zero_state.restore(folder, module._forward_module, with_optimizer=optimizer is not None)

    def state_bytes(self, module: nn.Module) -> int:
        # Stage 3 leaves nothing in place; master weights and moments are float32.
        numels = [(getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in module.parameters()]
        return sum(numel * (3 * max(size, 4) if trained else size) for numel, size, trained in numels)


_COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


def _choose_accelerator() -> None:
    """DeepSpeed asks for one when it is imported, and finds no CPU by itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _configuration(stage: int, offload: bool, hpz: int, further: dict[str, Any]) -> dict[str, Any]:
    decided = {"zero_optimization.stage": "stage", "gradient_clipping": "trainer.gradient_clip_val"}
    decided |= {"train_batch_size": "trainer.responses_per_update", "optimizer": "the module's optimizer"}
    decided |= {
        "gradient_accumulation_steps": "trainer.tokens_per_microbatch",
        "scheduler": "the module's lr_scheduler",
    }
    decided |= dict.fromkeys(("bf16", "fp16", "amp"), "trainer.precision")
    zero = {"stage": stage, "contiguous_gradients": True, "overlap_comm": True} | further.get("zero_optimization", {})
    for key, instead in decided.items():
        if key in further or (key == "zero_optimization.stage" and zero["stage"] != stage):
            raise ValueError(f"ZeRO's config must not set {key}; {instead} does.")
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if hpz != 1:
        zero["zero_hpz_partition_size"] = hpz
    # The caller's optimizer is stepped, whichever it is, and clipped as each step says: DeepSpeed's default is 1.
    own: dict[str, Any] = {"gradient_clipping": 0.0}
    own |= {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {**further, **own}


def _restore_buffers(module: nn.Module, buffers: dict[str, Tensor], device: torch.device) -> None:
    """DeepSpeed casts buffers with the weights: rotary frequencies in bfloat16 are other positions."""
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._buffers[attribute] = buffer.to(device)


class _BackwardSync(_BackwardSyncControl):
    """Fabric has none for DeepSpeed, whose engine then steps with the last micro-batch alone."""

    @contextmanager
    def no_backward_sync(self, module: Any, enabled: bool) -> Iterator[None]:
        module.set_gradient_accumulation_boundary(not enabled)
        try:
            yield
        finally:
            module.set_gradient_accumulation_boundary(True)
