"""From a checkpoint of any strategy to a Hugging Face folder: on one process, without the run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from lightrft.checkpoint import verify
from lightrft.engines.skeleton import auto_model
from lightrft.lightning_modules import pretrained
from lightrft.strategies import state

_PREFIX = state.MODEL + "language_model."


def export(checkpoint: Path, folder: Path, lora: Literal["merged", "apart"] = "merged") -> None:
    """Write the policy. A critic has no class of ``transformers`` that reads it; runs resume with it.

    Args:
        checkpoint: a complete one.
        folder: to be written.
        lora: adapters added to the weights, or alone, as peft reads them.

    Raises:
        ValueError: the checkpoint is damaged, is of another module than ours, or has no adapters to be kept apart.
    """
    verify(checkpoint)
    settings = checkpoint / "huggingface"
    adapters = (settings / "adapter_config.json").is_file()
    if lora == "apart":
        _check_apart(checkpoint, settings, adapters)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(settings)
        model = auto_model(config).from_config(config)
        language_model = _with_adapters(model, settings) if adapters else model
    model.generation_config = GenerationConfig.from_pretrained(settings)
    _load(language_model, checkpoint)
    model.tie_weights()
    processor = pretrained.load_processor(str(settings))
    if lora == "merged":
        pretrained.save_pretrained(model, processor, folder)
        return
    # Without this, peft asks the hub whether embeddings were resized.
    language_model.save_pretrained(folder, save_embedding_layers=False)
    processor.save_pretrained(folder)


def _check_apart(checkpoint: Path, settings: Path, adapters: bool) -> None:
    if not adapters:
        raise ValueError(f"{checkpoint} was trained without LoRA: there are no adapters to keep apart.")
    if _peft().LoraConfig.from_pretrained(settings).base_model_name_or_path is None:
        raise ValueError(f"The adapters in {checkpoint} lie on fresh weights, which no folder holds; merge them.")


def _with_adapters(model: Any, settings: Path) -> Any:
    peft = _peft()
    config = peft.LoraConfig.from_pretrained(settings)
    base = config.base_model_name_or_path
    adapted = peft.get_peft_model(model, config)
    adapted.active_peft_config.base_model_name_or_path = base  # for peft it is where the configuration was read
    return adapted


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("The checkpoint has LoRA adapters: pip install 'lightning-rft[peft]'.") from error
    return peft


def _load(model: Any, checkpoint: Path) -> None:
    """Put the weights, on the host, in place of those on the meta device."""
    held = state.contents(checkpoint)
    names = state.names_under(_PREFIX, held)
    if set(names) != state.weights_of(model).keys():
        raise ValueError(f"{checkpoint} holds other weights than a causal language model of its configuration has.")
    read = state.read(checkpoint, {_PREFIX + name: state.empty_like(held[_PREFIX + name]) for name in names})
    weights: dict[str, Tensor] = {name.removeprefix(_PREFIX): tensor for name, tensor in read.items()}
    model.load_state_dict(weights, strict=False, assign=True)
