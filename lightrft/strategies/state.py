"""A trained model and its optimizer as flat, named values, and as a folder of torch's distributed checkpoint.

One format whatever the strategy, so that each reads the others': ``model.<name>`` with the names of the module's own
``state_dict()`` (tied weights once), ``optimizer.state.<name>.<key>`` and ``optimizer.param_groups.<name>.<key>``, the
flattened form of :mod:`torch.distributed.checkpoint.state_dict`, and ``scaler.<key>`` where a loss scale has a state.
Torch's own functions are not used: they step an optimizer that never has, which then counts one step too many.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

State = dict[str, Any]
"""This rank's part of a model's state: host tensors (whole, or the local part of a DTensor) and plain values."""

MODEL, STATE, GROUPS, SCALER = "model.", "optimizer.state.", "optimizer.param_groups.", "scaler."


class Shares:
    """Deals out what every rank holds alike: each value to the rank with the fewest bytes so far."""

    def __init__(self) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._bytes = [0] * ranks

    def mine(self, value: Any) -> bool:
        """Whether this rank writes ``value``; asked on every rank in the same order."""
        if isinstance(value, DTensor):
            return True  # a part of its own
        rank = self._bytes.index(min(self._bytes))
        self._bytes[rank] += value.nbytes if isinstance(value, Tensor) else 0
        return rank == self._rank


def snapshot(module: nn.Module, optimizer: Optimizer, scaler: State | None = None) -> State:
    """This rank's part of the state, copied to the host: later steps do not change it. To be asked on every rank.

    Args:
        module: held whole by every rank, or as DTensors.
        optimizer: of its parameters, perhaps in Fabric's wrapper.
        scaler: state of the loss scale in float16.
    """
    shares, named = Shares(), _named(module, unwrapped(optimizer))
    kept = {name: on_host(value) for name, value in named if shares.mine(value)}
    return kept | {SCALER + name: value for name, value in (scaler or {}).items() if shares.mine(value)}


def on_host(value: Any) -> Any:
    """A copy in host memory."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, of which Fabric hands out a wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that last, as they are held; tied ones by their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    # By state_dict, before which FSDP2 puts its parameters back into shards.
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _named(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    weights = weights_of(module)
    yield from ((MODEL + name, tensor) for name, tensor in weights.items())
    for names, group in _named_groups(weights, optimizer):
        for name, parameter in zip(names, group["params"]):
            yield from ((f"{STATE}{name}.{key}", value) for key, value in optimizer.state.get(parameter, {}).items())
            yield from ((f"{GROUPS}{name}.{key}", value) for key, value in group.items() if key != "params")


def _named_groups(weights: dict[str, Tensor], optimizer: Optimizer) -> Iterator[tuple[list[str], dict[str, Any]]]:
    names = {id(tensor): name for name, tensor in weights.items()}
    for group in optimizer.param_groups:
        yield [names[id(parameter)] for parameter in group["params"]], group


# --- the folder ------------------------------------------------------------------------------------------------------


def write(folder: Path, state: State, group: dist.ProcessGroup | None) -> None:
    """Write the parts of all ranks of ``group``, flushed to the disk; ``None`` writes this process's alone.

    Raises:
        OSError: on every rank, where one could not write.
    """
    _quiet()
    try:
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise OSError(f"rank {rank}: {error}") from error


def read(folder: Path, into: State) -> State:
    """Fill ``into``: tensors in place, cast to their own dtype, and plain values. Each process reads for itself."""
    if not into:
        return into
    _quiet()
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(into, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
    except CheckpointException as failed:
        _, (error, _) = min(failed.failures.items())
        raise ValueError(" ".join(str(error).split())) from error
    return into


def contents(folder: Path) -> dict[str, Any]:
    """What the folder holds by name: torch's metadata of each tensor or value."""
    return dict(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def names_under(prefix: str, held: dict[str, Any]) -> list[str]:
    """The names in a folder that begin with ``prefix``, without it."""
    return [name.removeprefix(prefix) for name in held if name.startswith(prefix)]


def empty_like(metadata: TensorStorageMetadata, like: Tensor | None = None) -> Tensor:
    """A tensor to read into, placed as ``like`` where the shapes agree, else on the host."""
    dtype = metadata.properties.dtype
    if like is not None and like.ndim and like.shape == metadata.size:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(metadata.size, dtype=dtype)


def _quiet() -> None:
    """Reading and writing alone is what is meant here. Not undone: that would not be safe in a thread."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# --- reading it back -------------------------------------------------------------------------------------------------


def restore(folder: Path, module: nn.Module, optimizer: Optimizer | None, scaler: State | None = None) -> State:
    """Put the state of ``folder`` into a model that this process holds whole, or as DTensors; ``None``: weights alone.

    Returns:
        the state of the loss scale: ``scaler`` with what the folder knows of it.

    Raises:
        ValueError: names or shapes are not those of the model and the optimizer's parameters.
    """
    held, weights = contents(folder), weights_of(module)
    check_names(held, {name: tensor.shape for name, tensor in weights.items()})
    read(folder, {MODEL + name: tensor.detach() for name, tensor in weights.items()})
    if optimizer is not None:
        optimizer = unwrapped(optimizer)
        optimizer.load_state_dict(_optimizer_state(folder, held, weights, optimizer))
    known = {SCALER + name: value for name, value in (scaler or {}).items()}
    found = read(folder, {name: None for name in known if name in held})
    return {name.removeprefix(SCALER): value for name, value in (known | found).items()}


def check_names(held: dict[str, Any], shapes: dict[str, torch.Size]) -> None:
    """Raise ``ValueError`` where the weights in a folder are not those of a model."""
    there = set(names_under(MODEL, held))
    for names, what in ((shapes.keys() - there, "missing"), (there - shapes.keys(), "of no weight of this model")):
        if names:
            raise ValueError(f"{len(names)} weights are {what}, {min(names)!r} the first")
    for name, shape in shapes.items():
        if (size := held[MODEL + name].size) != shape:
            raise ValueError(f"size mismatch for {name}: {tuple(size)} in the checkpoint, {tuple(shape)} in this model")


def group_values(folder: Path, held: dict[str, Any], names: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """The values of an optimizer's parameter group, of those that are ``known`` to it.

    Raises:
        ValueError: a parameter of the group was not trained.
    """
    trained = {name for key in held if key.startswith(GROUPS) for name in [key.rpartition(".")[0]]}
    if untrained := [name for name in names if GROUPS + name not in trained]:
        raise ValueError(f"it trained {len(untrained)} parameters less, {untrained[0]!r} the first")
    prefix = f"{GROUPS}{names[0]}." if names else ""
    keys = [key for key in known if prefix and key != "params" and prefix + key in held]
    found = read(folder, {prefix + key: None for key in keys})
    return {key: found[prefix + key] for key in keys}


def _optimizer_state(
    folder: Path, held: dict[str, Any], weights: dict[str, Tensor], optimizer: Optimizer
) -> dict[str, Any]:
    """As ``Optimizer.load_state_dict`` takes it."""
    groups: list[dict[str, Any]] = []
    wanted: State = {}
    places: dict[str, tuple[int, str]] = {}
    keys = state_keys(held)
    for names, group in _named_groups(weights, optimizer):
        start = sum(len(one["params"]) for one in groups)
        numbers = list(range(start, start + len(names)))
        groups.append({**group, **group_values(folder, held, names, group), "params": numbers})
        for number, name in zip(numbers, names):
            for key in keys.get(name, ()):
                entry = f"{STATE}{name}.{key}"
                places[entry] = number, key
                tensor = isinstance(held[entry], TensorStorageMetadata)
                wanted[entry] = empty_like(held[entry], weights[name]) if tensor else None
    state: dict[int, dict[str, Any]] = {}
    for entry, value in read(folder, wanted).items():
        number, key = places[entry]
        state.setdefault(number, {})[key] = value
    return {"state": state, "param_groups": groups}


def state_keys(held: dict[str, Any]) -> dict[str, list[str]]:
    """Keys of the optimizer's state by parameter."""
    found: dict[str, list[str]] = {}
    for entry in names_under(STATE, held):
        name, _, key = entry.rpartition(".")
        found.setdefault(name, []).append(key)
    return found
