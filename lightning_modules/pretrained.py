"""Language models of ``transformers``, with what reads their prompts: loading, LoRA, parts, writing back."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, cached_file

from lightrft.checkpoint import is_checkpoint
from lightrft.engines.skeleton import auto_model
from lightrft.strategies import gathered, whole


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters through peft (arXiv 2106.09685). The reference policy is then the base, adapter off.

    Args:
        rank: rank of the update.
        alpha: the update is scaled by ``alpha / rank``.
        target_modules: module names, or ``all-linear``.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"

    @property
    def scaling(self) -> float:
        """Factor of the product of the two matrices."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"LoRA needs a rank of at least 1 (is {self.rank}) and alpha above 0 (is {self.alpha}).")


def load_model(name_or_path: str | None, config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedModel:
    """Weights by name or folder, or fresh weights of a config; float32 (the trainer's precision converts), no dropout.

    Raises:
        ValueError: the name or folder holds no model, or the config is none; says what to do.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if name_or_path is not None:
        _check_place(name_or_path, "model")
    try:
        if config is not None:
            known = _known_config(config)
            model = auto_model(known).from_config(known, **options)
        elif torch.get_default_device().type == "meta":
            model = _skeleton(str(name_or_path), options)
        else:
            # Trainers configure inside a device context, in which transformers loads only with accelerate's help.
            with torch.device("cpu"):
                auto = auto_model(AutoConfig.from_pretrained(name_or_path))
                model = auto.from_pretrained(name_or_path, **options)
        return _without_dropout(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"config {config}" if config is not None else f"model {name_or_path!r}"
        raise ValueError(f"Cannot build a language model from {what}: {_one_line(error)}") from error


def _skeleton(name_or_path: str, options: dict[str, Any]) -> PreTrainedModel:
    """Without weights, for a rank that gets them from another."""
    config = AutoConfig.from_pretrained(name_or_path)
    model = auto_model(config).from_config(config, **options)
    with suppress(OSError):  # the folder has none
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    return model


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model by name or folder; its weights are not asked for.

    Raises:
        ValueError: there is none.
    """
    _check_place(name_or_path, "model")
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read the configuration of {name_or_path!r}: {_one_line(error)}") from error


def _check_place(name_or_path: str, what: str) -> None:
    """Raise ``ValueError`` for a path that holds no model: the hub would say that it is no name."""
    if is_checkpoint(Path(name_or_path)):
        raise ValueError(
            f"The {what} folder {name_or_path!r} is a checkpoint of a run; make a Hugging Face folder of it first: "
            f"lightrft export {name_or_path} FOLDER"
        )
    if not Path(name_or_path).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name_or_path):
        raise ValueError(f"There is no {what} folder {name_or_path!r}; check the path.")


def _known_config(config: dict[str, Any] | PreTrainedConfig) -> Any:
    """The configuration; ``ValueError`` for a key that this kind of model does not know and would ignore."""
    if not isinstance(config, dict):
        return config
    if "model_type" not in config:
        raise ValueError("it names no model_type (qwen2, say).")
    known = AutoConfig.for_model(config["model_type"])
    for key in config:
        if not hasattr(known, key):
            close = difflib.get_close_matches(key, known.to_dict(), n=1)
            raise ValueError(
                f"it has the unknown key {key!r}; " + (f"did you mean {close[0]!r}?" if close else "remove it.")
            )
    return AutoConfig.for_model(**config)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """With dropout the policy that learns would not be the policy that sampled: ratios would differ from 1 at once."""
    for module in model.modules():
        # Families keep the rate in a Dropout, or as a number under a name of their own (attention_dropout, layerdrop).
        rates = ["p"] if isinstance(module, _DropoutNd) else [name for name in vars(module) if "drop" in name]
        for name in rates:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
    return model


def load_processor(name_or_path: str) -> Any:
    """What reads prompts: the tokenizer, or the processor around it where there is one for images or audio.

    A tokenizer without a padding token pads with its end of sequence.

    Raises:
        ValueError: there is none, or it has no end of sequence.
        ImportError: the processor needs a package that is not installed; names it.
    """
    _check_place(name_or_path, "tokenizer")
    auto = AutoProcessor if _has_processor(name_or_path) else AutoTokenizer
    try:
        processor = auto.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load a tokenizer from {name_or_path!r}: {_one_line(error)}") from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {name_or_path!r} has no eos_token; a response could never end. Set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _has_processor(name_or_path: str) -> bool:
    missing = {"_raise_exceptions_for_missing_entries": False}
    return any(cached_file(name_or_path, name, **missing) for name in (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME))


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Leave the weights whose names match one of the shell-style ``patterns`` as they are.

    Raises:
        ValueError: a pattern that matches no weight; names modules of close names.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = fnmatch.filter(weights, pattern)
        if not matched:
            parts = [name for name, part in model.named_modules() if name and next(part.parameters(), None) is not None]
            close = difflib.get_close_matches(pattern.strip(".*"), parts, n=3, cutoff=0.0)
            raise ValueError(
                f"freeze has {pattern!r}, which matches the whole name of no weight of {type(model).__name__}; did you "
                f"mean {' or '.join(repr(f'{name}.*') for name in close)}?"
            )
        for name in matched:
            weights[name].requires_grad_(False)


def add_lora(model: PreTrainedModel, lora: LoRA) -> nn.Module:
    """Put adapters into ``model``, in place, but for layers that are frozen already, and freeze the rest of it.

    Raises:
        ImportError: peft is not installed.
        ValueError: all layers that adapters are asked for are frozen.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'lightning-rft[peft]'.") from error
    # No task_type: it is for peft's own forward and generate, and a critic's layers without a head have no generate.
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules)
    weights = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    config.exclude_modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    return peft.get_peft_model(model, config)


def logits_of(model: PreTrainedModel, hidden: Tensor, never: Sequence[int] = ()) -> Tensor:
    """The head of ``model`` with the scalings some families put after it (Cohere, Granite, Gemma).

    Tokens ``never`` drawn get a logit of ``-inf``.
    """
    logits = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    if never:
        logits.index_fill_(-1, torch.tensor(never, device=logits.device), -torch.inf)
    return logits


def exported_weights(
    model: PreTrainedModel, skip: Container[str] = (), dtype: torch.dtype | None = None, merged: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names the plain ``transformers`` model gives them; tied ones come once.

    Whole ones, of sharded parameters too: every rank must take all of them, one after another, and only the one that
    was taken last is held. Parameters, then the buffers that a checkpoint holds (routing biases, say).

    Args:
        model: with or without adapters.
        skip: names of those that are not wanted; they are not gathered either.
        dtype: of floating ones; ``None`` is their own.
        merged: adapters are added. The base weights are not touched; merging in place and back would round them.
    """
    layers: dict[str, Any] = {f"{name}.base_layer.weight": layer for name, layer in _adapted(model) if merged}
    for name, parameter in model.named_parameters():
        plain = _plain(name)
        if ".lora_" not in name and plain not in skip:
            yield plain, _exported(parameter, layers.get(name), dtype)
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept and name not in skip:
            yield name, whole(buffer, dtype)


@torch.no_grad()
def _exported(parameter: Tensor, layer: Any, dtype: torch.dtype | None) -> Tensor:
    if layer is None:
        with gathered([parameter]):
            return whole(parameter, dtype)
    with gathered(layer.parameters()):
        delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        return whole(parameter + delta.to(parameter.dtype), dtype)


def exported_adapter(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The matrices of LoRA as an engine takes them, whole. Collective."""
    for name, layer in _adapted(model):
        (adapter,) = layer.active_adapters
        for part, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            yield f"{name}.{part}.weight", _exported(matrices[adapter].weight, None, dtype)


def frozen_weights(model: PreTrainedModel, merged: bool = True) -> frozenset[str]:
    """Names, among those of :func:`exported_weights`, of parameters that training leaves as they are.

    Of linear layers only where their siblings' are too: engines fuse these (queries, keys and values; gate and up), and
    one of them alone may change nothing there. Buffers are not among them: a forward may write them.
    """
    adapted = {f"{name}.weight" for name, _ in _adapted(model) if merged}
    groups: dict[str, str] = {}
    trained: set[str] = set()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            plain, owner = _plain(name), model.get_submodule(name.rpartition(".")[0])
            groups[plain] = _siblings(plain) if isinstance(owner, nn.Linear) else plain
            if parameter.requires_grad or plain in adapted:
                trained.add(groups[plain])
    return frozenset(name for name, group in groups.items() if group not in trained)


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Further names of weights that :func:`exported_weights` gives once: each with the name it is given by."""
    first: dict[Tensor, str] = {}
    names = [(name, first.setdefault(p, name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {_plain(name): _plain(given) for name, given in names if name != given}


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers with LoRA, by name."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _siblings(name: str) -> str:
    """What a weight shares with those that an engine may fuse it with: its module's parent, numbered ones (experts)
    being one."""
    parent = ".".join(name.split(".")[:-2])
    return re.sub(r"\.\d+$", "", parent)


def save_pretrained(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """A folder that ``from_pretrained`` loads, with merged weights and the tokenizer, or processor.

    On all ranks together, as each may hold but a part of the weights; the first one keeps them and writes.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    weights = {name: tensor.cpu() for name, tensor in exported_weights(model) if first}
    if not first:
        return
    # A fresh skeleton: the model in training may hold adapters and our attention's name.
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        skeleton = auto_model(config).from_config(config, attn_implementation="eager")
    skeleton.load_state_dict(weights, strict=False, assign=True)
    skeleton.tie_weights()
    skeleton.config, skeleton.generation_config = _configs(model, processor)
    skeleton.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_settings(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """What :func:`save_pretrained` writes besides weights."""
    for config in _configs(model, processor):
        config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _configs(model: PreTrainedModel, processor: Any) -> tuple[Any, Any]:
    """Configuration and generation settings as a reader needs them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    config, generation_config = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    # Fresh weights name no tokens of their own; a reader that does not ask the tokenizer would never stop.
    for name in ("eos_token_id", "pad_token_id"):
        for one in (config, generation_config):
            if getattr(one, name, None) is None:
                setattr(one, name, getattr(tokenizer, name))
    return config, generation_config


def save_lora(model: Any, base: str | None, folder: Path) -> None:
    """``adapter_config.json``, from which peft, and :func:`from_checkpoint`, builds the adapters anew."""
    config = copy.deepcopy(model.active_peft_config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
