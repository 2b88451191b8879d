"""The ``transformers`` model of a config, without its parameters: what an engine fills, or compares names with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from lightrft.engines.base import EngineError


def auto_model(config: Any) -> Any:
    """The class of ``transformers`` that builds and loads models of a config that generate text."""
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForMultimodalLM


def build(config: Any, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The model with buffers on ``device`` and parameters nowhere, the generators of this process left as they were.

    Args:
        config: copied, as models write into theirs.
        dtype: of the parameters; ``None`` is the config's.
        device: of the buffers.

    Raises:
        EngineError: ``transformers`` has no model that generates text for the config.
    """
    config = copy.deepcopy(config)
    auto = auto_model(config)
    dtype = dtype or config.dtype or torch.get_default_dtype()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device), without_parameters():
        try:
            # Built in its dtype rather than cast: buffers such as rotary frequencies keep float32, as when loaded.
            model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
        except ValueError:
            model = _build_eager(auto, config, dtype)
    return model.eval().requires_grad_(False)


def _build_eager(auto: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """For the few architectures without scaled dot product attention."""
    try:
        return auto.from_config(config, dtype=dtype, attn_implementation="eager")
    except ValueError as error:
        raise EngineError(
            f"transformers has no model that generates text for {type(config).__name__}: {error}"
        ) from error


@contextmanager
def without_parameters() -> Iterator[None]:
    """Modules built in it have parameters without storage, but real buffers; building a large one takes no memory."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # those that are may be tied
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = empty  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
