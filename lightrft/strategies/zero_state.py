"""State of a model under DeepSpeed's ZeRO in the format of :mod:`lightrft.strategies.state`.

Its parts lie in flat partitions, so each tensor is made whole on all ranks, one at a time, and kept on one of them;
read back, each rank takes its fragment of the whole tensor. Master weights (float32) are what counts: of those computed
with in half precision they are a rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightrft.strategies.state import (
    GROUPS,
    MODEL,
    SCALER,
    STATE,
    Shares,
    State,
    check_names,
    contents,
    empty_like,
    group_values,
    on_host,
    read,
    state_keys,
    weights_of,
)
from lightrft.strategies.whole import gathered, local_parts, whole

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALER = ("cur_iter", "last_overflow_iter", "cur_hysteresis")
_AT_ONCE = 2**28
"""Bytes that are read before they are put in place."""


@dataclass(frozen=True)
class _Flat:
    """A flat partition of master weights, which the optimizer steps.

    Attributes:
        master: this rank's partition.
        parameters: whose elements the partitions of all ranks are, by name.
        group: the optimizer's parameter group.
        state: the optimizer's state of ``master``.
    """

    master: Tensor
    parameters: dict[str, Tensor]
    group: dict[str, Any]
    state: dict[str, Any]

    @property
    def moments(self) -> list[str]:
        """Keys of what the optimizer keeps for each element."""
        return [key for key, value in self.state.items() if _is_moment(value, self.master)]


def snapshot(engine: Any) -> State:
    """This rank's part of the state, on the host. Collective."""
    shares, kept = Shares(), {}
    for name, value in _named(engine):
        if shares.mine(value):
            kept[name] = on_host(value)
    return kept


def held_optimizer_state(engine: Any) -> list[Tensor]:
    """This rank's master weights and their moments, less what shares its memory with the weights to compute with."""
    weights = weights_of(engine.module)
    found = [
        tensor
        for flat in _flats(engine, weights)
        for tensor in (flat.master, *(value for value in flat.state.values() if isinstance(value, Tensor)))
    ]
    shared = {part.untyped_storage()._cdata for weight in weights.values() for part in local_parts(weight)}
    return [tensor.detach() for tensor in found if tensor.untyped_storage()._cdata not in shared]


def _named(engine: Any) -> Iterator[tuple[str, Any]]:
    """Names and whole values; every rank must take all of them."""
    weights = weights_of(engine.module)
    yield from ((MODEL + name, _master(tensor)) for name, tensor in weights.items())
    for flat in _flats(engine, weights):
        for name, parameter in flat.parameters.items():
            for key in flat.moments:
                yield f"{STATE}{name}.{key}", _moment(parameter, key)
            for key, value in flat.state.items():
                if key not in flat.moments:
                    # An int in DeepSpeed's own optimizers, a tensor in torch's.
                    yield f"{STATE}{name}.{key}", torch.as_tensor(value, dtype=torch.float32)
            yield from ((f"{GROUPS}{name}.{key}", value) for key, value in flat.group.items() if key != "params")
    yield from ((f"engine.{name}", getattr(engine, name)) for name in _COUNTERS)
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):
        yield f"{SCALER}scale", float(scaler.cur_scale)
        yield from ((SCALER + name, getattr(scaler, name)) for name in _SCALER)


def _master(tensor: Tensor) -> Tensor:
    import deepspeed.utils as ds

    if _is_trained(tensor):
        return ds.safe_get_full_fp32_param(tensor)
    with gathered([tensor]):
        return whole(tensor)


def _is_trained(tensor: Tensor) -> bool:
    # Stage 3 keeps frozen parameters too, without master weights.
    return tensor.requires_grad and (hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"))


def _moment(parameter: Tensor, key: str) -> Tensor:
    import deepspeed.utils as ds

    return ds.safe_get_full_optimizer_state(parameter, key)


def _flats(engine: Any, weights: dict[str, Tensor]) -> list[_Flat]:
    optimizer = engine.optimizer
    stepped = optimizer.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        masters, parameters = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        groups = [optimizer.sub_group_to_group_id[number] for number in range(len(masters))]
    else:
        kept = "fp32_groups_flat_partition"  # of stage 1 with bfloat16 and gradients in float32
        masters = getattr(optimizer, kept, None) or optimizer.single_partition_of_fp32_groups
        parameters = optimizer.bf16_groups if hasattr(optimizer, kept) else optimizer.bit16_groups
        groups = list(range(len(masters)))
    names = {id(tensor): name for name, tensor in weights.items()}
    return [
        _Flat(
            master,
            {names[id(parameter)]: parameter for parameter in mine},
            stepped.param_groups[group],
            stepped.state.get(master, {}),
        )
        for master, mine, group in zip(masters, parameters, groups)
    ]


# --- reading it back -------------------------------------------------------------------------------------------------


def restore(folder: Path, engine: Any, with_optimizer: bool) -> None:
    """Put the state of ``folder``, of any strategy, into an engine. Collective.

    Raises:
        ValueError: names or shapes are not those of the model and the optimizer's parameters.
    """
    held, weights = contents(folder), weights_of(engine.module)
    check_names(held, {name: torch.Size(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in weights.items()})
    targets = {MODEL + name: tensor for name, tensor in weights.items()}
    for name, value in _values(folder, held, list(targets)):
        _put_weight(targets[name], value)
    if with_optimizer:
        for flat in _flats(engine, weights):
            _restore_flat(folder, held, flat, engine.optimizer.optimizer)
        if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2: fragments are views of the state
            _link(engine)
        for flat in _flats(engine, weights):
            _restore_moments(folder, held, flat)
        _restore_counters(folder, held, engine)


def _values(folder: Path, held: dict[str, Any], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of the folder on the host, a bounded number of bytes of them at a time."""
    batch: State = {}
    for name in names:
        batch[name] = empty_like(held[name])
        if sum(tensor.nbytes for tensor in batch.values()) >= _AT_ONCE:
            yield from read(folder, batch).items()
            batch = {}
    yield from read(folder, batch).items()


def _set(tensor: Any, value: Tensor, moment: str | None = None) -> None:
    """A float32 master's value, or that of one of its moments."""
    import deepspeed.utils as ds

    if hasattr(tensor, "ds_id"):
        # Of whole values DeepSpeed sets no tensor whose elements its ranks do not divide evenly.
        share, rank = tensor.ds_tensor.numel(), tensor._z3_optimizer._get_param_partition_rank(tensor)
        padded = functional.pad(value.flatten(), (0, max(0, share * (rank + 1) - value.numel())))
        value = padded[share * rank :][:share]
        state, master = ds.safe_set_local_optimizer_state, ds.safe_set_local_fp32_param
    else:
        state, master = ds.safe_set_full_optimizer_state, ds.safe_set_full_fp32_param
    if moment is None:
        master(tensor, value)
    else:
        state(tensor, value, moment)


@torch.no_grad()
def _put_weight(tensor: Tensor, value: Tensor) -> None:
    import deepspeed

    value = value.to(tensor.device)
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(value)
    else:
        tensor.data.copy_(value)
    if _is_trained(tensor):
        _set(tensor, value.float())


def _restore_flat(folder: Path, held: dict[str, Any], flat: _Flat, stepped: Any) -> None:
    """The group's values, the counters of its state, and room for its moments."""
    names = list(flat.parameters)
    flat.group.update(group_values(folder, held, names, flat.group))
    keys = state_keys(held)
    found = {key for name in names for key in keys.get(name, ())}
    state: dict[str, Any] = {}
    for key in found:
        entry = f"{STATE}{names[0]}.{key}"
        if held[entry].size == torch.Size():
            count = read(folder, {entry: empty_like(held[entry])})[entry]
            # DeepSpeed's own optimizers count with an int.
            state[key] = count if type(stepped).__module__.startswith("torch.") else int(count)
        else:
            state[key] = torch.zeros_like(flat.master)
    stepped.state.pop(flat.master, None)
    if state:
        stepped.state[flat.master] = state


def _link(engine: Any) -> None:
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _restore_moments(folder: Path, held: dict[str, Any], flat: _Flat) -> None:
    entries = {
        f"{STATE}{name}.{key}": (tensor, key) for name, tensor in flat.parameters.items() for key in flat.moments
    }
    for entry, value in _values(folder, held, list(entries)):
        tensor, key = entries[entry]
        _set(tensor, value.to(tensor.device), key)


def _restore_counters(folder: Path, held: dict[str, Any], engine: Any) -> None:
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    targets = {f"engine.{name}": (engine, name) for name in _COUNTERS}
    if getattr(scaler, "dynamic", False):
        targets |= {f"{SCALER}scale": (scaler, "cur_scale")}
        targets |= {SCALER + name: (scaler, name) for name in _SCALER}
    for name, value in read(folder, {name: None for name in targets if name in held}).items():
        owner, attribute = targets[name]
        setattr(owner, attribute, value)


def _is_moment(value: Any, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == master.shape and value.ndim > 0
