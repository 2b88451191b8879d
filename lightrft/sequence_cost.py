"""What a sequence costs the actor: its text decoder, and the towers that see or hear for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from lightrft.ops import CostModel
from lightrft.samples import MediaItem, Reading
from lightrft.strategies import blocks

# Of what is frozen only the forward is computed, which is a third of the operations of both.
_FORWARD_ALONE = 1 / 3


@dataclass(frozen=True)
class Tower:
    """Cost of a vision or audio tower, in units of what the decoder's linear layers cost one token.

    Attributes:
        weights: of one of the tower's tokens, as a patch and in the blocks.
        attention: of a pair of them.
        projection: of one of the decoder's tokens, to which the tower's are projected.
        patch: pixels of a side of what is one token, where it is given whole images.
    """

    weights: float
    attention: float
    projection: float
    patch: int

    def __call__(self, item: MediaItem) -> float:
        in_blocks = sum(self.weights * length + self.attention * length**2 for length in self._lengths(item))
        return in_blocks + self.projection * len(item.token_ids)

    def _lengths(self, item: MediaItem) -> Sequence[int]:
        """Tokens of the tower that attend to each other, for each part of an item."""
        grid = item.features.get("video_grid_thw")
        if grid is not None:  # whose frames are seen each by itself
            return [height * width for frames, height, width in grid.tolist() for _ in range(frames)]
        given = [tensor for tensor in item.features.values() if tensor.is_floating_point()]
        return max((self._tokens(tensor) for tensor in given), key=sum, default=[])

    def _tokens(self, features: Tensor) -> list[int]:
        parts = features.shape[0]
        if features.ndim == 4:  # images, or the tiles of one
            return [features.shape[2] // self.patch * (features.shape[3] // self.patch)] * parts
        if features.ndim == 3:  # spectrograms, of which a convolution joins every two frames
            return [features.shape[2] // 2] * parts
        return [parts]  # patches


@dataclass(frozen=True)
class SequenceCost:
    """In units of what the linear layers of the decoder cost one token; forward and backward.

    Attributes:
        decoder: of the tokens.
        towers: by kind of media.
    """

    decoder: CostModel
    towers: Mapping[str, Tower] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> SequenceCost:
        """Of a ``transformers`` model, before a strategy has placed it."""
        config = model.config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        experts = getattr(config, "num_experts_per_tok", None)
        width = (getattr(config, "moe_intermediate_size", None) if experts else None) or _width(config)
        layers, head_size = config.num_hidden_layers, getattr(config, "head_dim", None) or hidden // heads
        decoder = CostModel.of_shape(
            hidden_size=hidden,
            layers=layers,
            intermediate_size=width * (experts or 1),
            heads=heads,
            key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=head_size,
            vocabulary=config.vocab_size,
        )
        weights = layers * heads * head_size / decoder.attention  # which is that of so many
        configs = {name: getattr(model.config, name, None) for name in ("vision_config", "audio_config")}
        found = {name: _tower(model, own, weights) for name, own in configs.items()}
        towers = {"images": "vision_config", "videos": "vision_config", "audios": "audio_config"}
        return cls(decoder, {kind: tower for kind, name in towers.items() if (tower := found[name]) is not None})

    def __call__(self, tokens: int, reading: Reading | None = None) -> float:
        """Of so many tokens, and of the media that were read for them."""
        items = reading.items if reading is not None else []
        return self.decoder(tokens) + sum(self.towers[item.kind](item) for item in items if item.kind in self.towers)


def _tower(model: Any, config: Any, weights: float) -> Tower | None:
    """``weights`` are those of the decoder that a token goes through."""
    if config is None:
        return None
    tower: Any = next((part for part in model.modules() if type(getattr(part, "config", None)) is type(config)), None)
    if tower is None:
        return None
    in_blocks = {linear for block in blocks(tower) for linear in _linear(block)}
    of_patches = {part for part in tower.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    of_text = {*_linear(model.get_decoder()), model.get_output_embeddings()}
    attending = getattr(config, "fullatt_block_indexes", None)  # the others see a window
    layers = len(attending) if attending is not None else _first(config, "depth", "num_hidden_layers", "encoder_layers")
    patch = getattr(config, "patch_size", 1)
    return Tower(
        weights=_work(in_blocks | of_patches) / weights,
        attention=_share(in_blocks) * 2 * layers * _first(config, "hidden_size", "d_model") / weights,
        projection=_work(_linear(model) - in_blocks - of_text) / weights,
        patch=patch[0] if isinstance(patch, (list, tuple)) else patch,
    )


def _linear(module: nn.Module) -> set[nn.Module]:
    return {part for part in module.modules() if isinstance(part, nn.Linear)}


def _work(parts: set[nn.Module]) -> float:
    """Of their weights for one token."""
    return _share(parts) * sum(weight.numel() for weight in _weights(parts))


def _share(parts: set[nn.Module]) -> float:
    return 1.0 if any(weight.requires_grad for weight in _weights(parts)) else _FORWARD_ALONE


def _weights(parts: set[nn.Module]) -> list[Tensor]:
    return [cast(Tensor, part.weight) for part in parts]


def _first(config: Any, *names: str) -> int:
    return int(next(value for name in names if (value := getattr(config, name, None)) is not None))


def _width(config: Any) -> int:
    """Of the MLP; where a configuration does not name it, four times the hidden size, as the first transformers had."""
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
