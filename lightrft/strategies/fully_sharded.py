"""FSDP2: every rank holds a shard of each weight, of its gradient and of its optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.types import _PATH
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightrft.strategies.placement import Placement
from lightrft.strategies.process_group import TIMEOUT, backend_for
from lightrft.strategies.replicated import Replicated

_COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallel by ``fully_shard`` (Zhao et al. 2023, arXiv 2304.11277) as a strategy of Fabric.

    Each transformer block is a unit whose weights are gathered while it computes; embeddings and head are apart from
    them. In ``bf16-mixed`` they are gathered and computed with in bfloat16, while gradients are reduced, kept and
    stepped with in float32. Runs on gloo and CPUs as well.

    Args:
        replicas: copies of the model, each sharded over ``world size / replicas`` consecutive ranks (HSDP): as many as
            there are nodes keeps the gathering inside a node.
        cpu_offload: keep the shards, and step, in host memory.

    Raises:
        ValueError: ``replicas`` does not divide the number of ranks.
    """

    def __init__(self, replicas: int = 1, cpu_offload: bool = False) -> None:
        super().__init__(parallelize_fn=self._shard, timeout=TIMEOUT)
        if replicas < 1:
            raise ValueError(f"FSDP2 needs replicas of at least 1, not {replicas}.")
        self.replicas, self.cpu_offload = replicas, cpu_offload
        self._backward_sync_control = _BackwardSync()

    def placement(self, ranks: int, precision: str) -> Placement:
        """How a model lies over ``ranks``.

        Raises:
            ValueError: ``replicas`` does not divide them.
        """
        shards = _ranks_of_a_replica(ranks, self.replicas)
        dtype = _COMPUTE_DTYPES.get(precision)
        return Placement(
            weight_shards=shards,
            gradient_shards=shards,
            optimizer_shards=shards,
            on_host=frozenset(("weights", "gradients", "optimizer") if self.cpu_offload else ()),
            compute_bytes=dtype.itemsize if dtype else None,
            gathers=True,
        )

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        self._device_mesh = sharding_mesh(self.root_device.type, self.world_size, self.replicas)

    def _get_process_group_backend(self) -> str:
        return backend_for(self.root_device)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _shard(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        dtype = _COMPUTE_DTYPES.get(self.precision.precision)
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.cpu_offload else None
        shard_blocks(module, mesh, precision, offload, device=self.root_device)
        return module

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard ``module`` in place. Ranks that built it on the meta device get rank 0's values."""
        return self._shard(module, self.device_mesh)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        with _followed_by(optimizers, module):
            sharded = self.setup_module(module)
        return sharded, optimizers, scheduler

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """The global norm before clipping, whole on every rank."""
        norm = super().clip_gradients_norm(*args, **kwargs)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def load_checkpoint(
        self, path: _PATH, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Fabric's, and into objects with a state of their own: Fabric's puts a plain dict in their place."""
        given = dict(state) if isinstance(state, dict) else {}
        rest = super().load_checkpoint(path, state, strict, weights_only)
        for name, target in given.items():
            loaded = state[name]
            if loaded is not target and hasattr(target, "load_state_dict"):
                target.load_state_dict(loaded)
                state[name] = target
        return rest


class FullySharded(Replicated):
    """FSDP2 behind the common surface."""

    @contextmanager
    def building(self) -> Iterator[None]:
        """Rank 0 alone holds what is loaded; the others get their shards of it in :meth:`setup`."""
        with torch.device("meta" if self.fabric.global_rank else "cpu"):
            yield

    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        # Apart, as Fabric takes no optimizer of parameters on the meta device.
        with _followed_by([optimizer], module):
            sharded = self.fabric.setup_module(module)
        self._deafen(module)
        return sharded, self.fabric.setup_optimizers(optimizer)

    def _placed(self, module: nn.Module) -> nn.Module:
        return self.fabric.strategy.setup_module(self.precision.convert_module(module))

    def accumulate(self, module: Any, last: bool) -> AbstractContextManager[None]:
        # Reduced in every micro-batch: to wait for the last would hold a whole gradient on each rank.
        return self.fabric.no_backward_sync(module, enabled=False)


def sharding_mesh(device_type: str, world_size: int, replicas: int = 1) -> DeviceMesh:
    """The mesh to shard over: one-dimensional, or ``(replicate, shard)`` where there is more than one replica.

    Raises:
        ValueError: ``replicas`` does not divide ``world_size``.
    """
    shape = (replicas, _ranks_of_a_replica(world_size, replicas))
    if replicas == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def _ranks_of_a_replica(ranks: int, replicas: int) -> int:
    if ranks % replicas:
        raise ValueError(f"FSDP2(replicas={replicas}) cannot share {ranks} ranks; choose a divisor of them.")
    return ranks // replicas


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """Of the mesh that Lightning's ``ModelParallelStrategy`` gives a module, the dimension to shard over.

    Raises:
        ValueError: the other one, tensor parallel, is more than 1.
    """
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape))
    if sizes["tensor_parallel"] != 1:
        raise ValueError(
            f"ModelParallelStrategy has tensor_parallel_size={sizes['tensor_parallel']} (tensor parallel alone is its "
            f"default), which is not supported; set data_parallel_size={mesh.size()} and tensor_parallel_size=1."
        )
    return mesh["data_parallel"]


def shard_blocks(
    module: nn.Module,
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy | None = None,
    offload: OffloadPolicy | None = None,
    device: torch.device | None = None,
) -> None:
    """``fully_shard`` each transformer block, then what is left: embeddings, head, final norm. In place, collective.

    Embeddings that the head does not share are a unit of their own; the head stays in the root's, which computes it in
    pieces and would otherwise gather it for each.

    Args:
        module: on any device, on ranks other than 0 also the meta device: they get rank 0's values.
        mesh: of :func:`sharding_mesh`.
        precision: dtypes of compute and reduction; ``None`` is those of the weights.
        offload: where shards lie; ``None`` is on the device.
        device: where to compute; ``None`` is this rank's of the mesh.
    """
    device = device or _device_of(mesh)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    options["offload_policy"] = offload or OffloadPolicy()
    fill = _Filler(module, device)
    for unit in _units(module):
        fill(unit)
        fully_shard(unit, **options)
    fill(module)
    fully_shard(module, **options)
    module.register_forward_hook(_reshard_after_no_grad)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost ones of those that ``transformers`` calls not to be split: layers of decoders and towers."""
    names: set[str] = set()
    for part in module.modules():
        names.update(getattr(part, "_no_split_modules", None) or ())
    found = [part for part in module.modules() if type(part).__name__ in names]
    inside = {part for block in found for part in block.modules() if part is not block}
    return [block for block in found if block not in inside]


def _units(module: nn.Module) -> list[nn.Module]:
    """Blocks, and input embeddings that are nobody else's: what is called, for then the weights are gathered.

    Tables of positions, which some models read without a call (Qwen2-Audio), are small and stay in the root.
    """
    users: dict[Tensor, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            users[parameter] = users.get(parameter, 0) + 1
    units = blocks(module)
    inside = {part for unit in units for part in unit.modules()}
    alone = [part for part in _input_embeddings(module) if part not in inside and users[part.weight] == 1]
    return units + alone


def _input_embeddings(module: nn.Module) -> list[nn.Embedding]:
    found: dict[Any, None] = {}  # in the same order on every rank
    for part in module.modules():
        ask: Any = getattr(part, "get_input_embeddings", None)
        if ask is not None:
            with suppress(NotImplementedError):  # a tower has none
                found[ask()] = None
    return [part for part in found if isinstance(part, nn.Embedding)]


class _Filler:
    """Gives a unit's tensors their values on the device, one unit at a time, so that no rank ever holds all of them."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        # One rank's view may be real where another's is on the meta device; all must broadcast alike.
        on_meta = any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
        self.from_rank_0 = _any_rank(on_meta, device)
        self._filled: dict[Tensor, Any] = {}

    @torch.no_grad()
    def __call__(self, unit: nn.Module) -> None:
        for part in unit.modules():
            stores: list[dict[str, Any]] = [part._parameters, part._buffers]
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None and not isinstance(tensor, DTensor):
                        store[name] = self._value(tensor)

    def _value(self, tensor: Tensor) -> Tensor:
        if tensor in self._filled:
            return self._filled[tensor]
        value = torch.empty_like(tensor, device=self.device) if tensor.is_meta else tensor.to(self.device)
        if self.from_rank_0:
            value = value.contiguous()
            dist.broadcast(value, src=0)
        if isinstance(tensor, nn.Parameter):
            value = tensor if value is tensor else nn.Parameter(value, tensor.requires_grad)
        # Both ways: tied weights come again under the old tensor, shared modules under the new one.
        self._filled[tensor] = self._filled[value] = value
        return value


def _any_rank(flag: bool, device: torch.device) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _reshard_after_no_grad(module: nn.Module, arguments: Any, output: Any) -> None:
    """The root stays gathered for a backward; after a forward without one its weights would read as plain copies."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, module).reshard()


@contextmanager
def _followed_by(optimizers: list[Optimizer], module: nn.Module) -> Iterator[None]:
    """Around the sharding of ``module``, in place: optimizers then step the sharded parameters of the same names."""
    if any(optimizer.state for optimizer in optimizers):
        raise ValueError("FSDP2 needs an optimizer that has not stepped yet; its state would belong to whole weights.")
    names = {parameter: name for name, parameter in module.named_parameters()}
    yield
    sharded = dict(module.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]


class _BackwardSync(_BackwardSyncControl):
    """Fabric's own leaves the reduction switched off after ``no_backward_sync(enabled=False)``."""

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        units = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(not enabled, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)
