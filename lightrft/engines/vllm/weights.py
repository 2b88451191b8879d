"""The weights inside a vLLM worker: taken in, found by their ``transformers`` names, read as they compute.

Every function takes the worker first: vLLM runs it where the model is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.engines.base import EngineError
from lightrft.ops.fingerprint import Fingerprint, Fingerprints


def load(worker: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take whole tensors, one after the other, into the running model.

    A model that computes with weights as they are takes them in place. One that packs them for the CPU or quantises
    them makes each layer anew from all of its weights.
    """
    model = worker.model_runner.model
    if not _remade(worker):
        model.load_weights(tensors)
        return
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    try:
        model.load_weights(tensors)
    finally:  # also when the tensors break off: the model must be able to take the next ones
        finalize_layerwise_reload(model, worker.model_runner.model_config)


def known_names(worker: Any, forms: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """By name in memory, the first of its forms that the model holds a weight under.

    A weight that it does not hold, as of layers behind the last one it computes, is called as the one of the most
    alike name: vLLM drops what it knows, and refuses what it does not.

    Args:
        worker: vLLM's.
        forms: as :func:`~lightrft.engines.checkpoint_names.checkpoint_names` gives them.
    """
    model = worker.model_runner.model
    held = {name: next((i for i, form in enumerate(forms) if _holds(model, form[name])), -1) for name in forms[0]}

    def form_of(name: str) -> int:
        found = [other for other in held if held[other] >= 0]
        return held[max(found, key=lambda other: _common(name, other), default=name)]

    return {name: forms[form if form >= 0 else form_of(name)][name] for name, form in held.items()}


def dropped(worker: Any, names: Mapping[str, str]) -> frozenset[str]:
    """The names among ``names``, as for :func:`kept_together`, whose weight the model has no use for."""
    model = worker.model_runner.model
    return frozenset(name for name, own in names.items() if not _holds(model, own))


def kept_together(worker: Any, names: Mapping[str, str]) -> dict[str, list[str]]:
    """By name, the names of the weights that one layer holds as one, where it must get them all at once.

    Args:
        worker: vLLM's.
        names: what each is called here (:func:`known_names`), by its name in memory.
    """
    model = worker.model_runner.model
    if not _remade(worker):
        return {}
    groups: dict[tuple[str, str], list[str]] = {}
    for name, own in names.items():
        path, part = _locate(model, own) or ("", None)
        if part is not None:
            groups.setdefault((path, own.rpartition(".")[2]), []).append(name)
    return {name: group for group in groups.values() for name in group}


def fingerprints(worker: Any, names: Sequence[str]) -> dict[str, Fingerprint]:
    """Fingerprints of what the model computes with; ``<name>_scale`` are the scales of a weight in 8 bits.

    Raises:
        EngineError: a name that the model has no weight for.
    """
    model, taken, dtype = worker.model_runner.model, Fingerprints(), worker.model_runner.model_config.dtype
    for name in names:
        weight, scale = _held(model, name.removesuffix("_scale"))
        if (
            weight.is_floating_point() and weight.dtype.itemsize > dtype.itemsize
        ):  # as pushed, and kept wider: biases on a CPU
            weight = weight.to(dtype)
        tensor = scale if name.endswith("_scale") else weight
        if tensor is None:
            raise _no_weight(model, name)
        taken.add(name, tensor)
    return taken.read()


def in_float8(worker: Any, names: Mapping[str, str]) -> frozenset[str]:
    """The names among ``names``, as for :func:`kept_together`, whose weight the model holds in 8 bits."""
    model, without = worker.model_runner.model, dropped(worker, names)
    return frozenset(name for name in names.keys() - without if _held(model, names[name])[1] is not None)


def _remade(worker: Any) -> bool:
    config = worker.model_runner.model_config
    return config.quantization is not None or worker.device.type == "cpu"


def _holds(model: nn.Module, name: str) -> bool:
    found = _locate(model, name)
    return found is not None and isinstance(getattr(model.get_submodule(found[0]), _leaf(name), None), Tensor)


def _held(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """A weight as the model computes with it, and the scales of its rows where it is in float8."""
    path, part = _locate(model, name) or ("", None)
    module: Any = model.get_submodule(path)
    rows = _rows(module, part)
    scale = getattr(module, "weight_scale", None) if _leaf(name) == "weight" else None
    if scale is not None:
        return module.weight.t()[rows].contiguous(), scale.flatten()[rows].contiguous()
    if _leaf(name) == "weight" and hasattr(module, "cpu_linear"):
        return _read_packed(module)[rows], None
    tensor = getattr(module, _leaf(name), None)
    if not path or not isinstance(tensor, Tensor):
        raise _no_weight(model, name)
    return tensor.detach()[rows], None


def _locate(model: nn.Module, name: str) -> tuple[str, int | None] | None:
    """Path of the module that holds a weight, and which of its parts the weight is where it holds several."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = mapper.apply_list([name]) if mapper is not None else [name]
    path = mapped[0].rpartition(".")[0] if mapped else ""
    around, own = path.rpartition(".")[0], name.split(".")[-2]
    for packed, parts in _packed(model, around):
        joint = f"{around}.{packed}"  # where some versions' mapper leads by itself
        if own in parts and own != packed and _has(model, joint):
            return joint, parts.index(own)
    return (path, None) if _has(model, path) else None


def _packed(model: nn.Module, path: str) -> Iterator[tuple[str, list[str]]]:
    """What is joined, and of which parts, by what the modules on the way to ``path`` say."""
    module: Any = model
    for part in ["", *path.split(".")]:
        module = getattr(module, part, None) if part else module
        yield from (getattr(module, "packed_modules_mapping", None) or {}).items()


def _common(one: str, other: str) -> int:
    """Leading parts that two names share."""
    pairs = zip(one.split("."), other.split("."))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _no_weight(model: nn.Module, name: str) -> EngineError:
    return EngineError(f"vLLM's {type(model).__name__} holds no weight for {name!r}.")


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return bool(path)


def _rows(module: Any, part: int | None) -> slice:
    if part is not None:
        sizes = module.output_partition_sizes
        return slice(sum(sizes[:part]), sum(sizes[: part + 1]))
    # Embeddings are padded to a multiple of 64 rows.
    return slice(0, getattr(module, "org_vocab_size", None))


def _read_packed(module: Any) -> Tensor:
    """The matrix ``[N, K]`` that ``cpu_linear`` multiplies by, which may be a packed copy: its products with units."""
    width = getattr(module, "input_size_per_partition", None) or module.weight.shape[1]
    with torch.no_grad():
        units = torch.eye(width, dtype=module.weight.dtype).split(256)
        return torch.cat([module.cpu_linear(part, module.weight, None) for part in units]).t().contiguous()
