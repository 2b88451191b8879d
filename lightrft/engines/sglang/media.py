"""Prompts with media as SGLang takes them: read by the model's own processor, placed by its own method."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrft.ops.packing import joined_features
from lightrft.samples import MediaItem, Reading

# Architectures of which SGLang 0.5.14 has models that agree with transformers'; of InternVL and LLaVA in the form that
# transformers has them it has none.
SERVED = frozenset(
    (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen2AudioForConditionalGeneration",
    )
)
# Each item has one feature that a tower reads; the others say how.
_READ_BY_TOWERS = frozenset(("pixel_values", "pixel_values_videos", "input_features"))
SECONDS = "second_per_grid_ts"
"""The feature that says how long a video's frames last."""

_MODALITIES = {"images": "IMAGE", "videos": "VIDEO", "audios": "AUDIO"}


def hear_clips_alone() -> None:
    """Have SGLang's Qwen2-Audio attend to a clip alone, as in ``transformers``, not to the silence behind it too."""
    from sglang.srt.models.qwen2_audio import Qwen2AudioForConditionalGeneration

    Qwen2AudioForConditionalGeneration.get_audio_feature = _heard


def _heard(model: Any, items: Sequence[Any]) -> Tensor:
    """Features ``[N, H]`` of all items, in place of its own ``get_audio_feature``."""
    tower, device = model.audio_tower, model.audio_tower.conv1.weight.device
    frames = torch.cat([item.feature_attention_mask.sum(-1) for item in items]).to(device)
    lengths, _ = tower._get_feat_extract_output_lengths(frames)
    spectrograms = torch.cat([item.feature for item in items]).to(device, tower.dtype)
    behind = torch.arange(tower.config.max_source_positions, device=device) >= lengths[:, None]
    mask = torch.zeros_like(behind, dtype=tower.dtype).masked_fill_(behind, torch.finfo(tower.dtype).min)
    heard = model.multi_modal_projector(tower(spectrograms, mask[:, None, None]).last_hidden_state)
    return torch.cat([one[: int(item.audio_feature_lens)] for one, item in zip(heard, items)])


class AsPrepared:
    """Stands in the place of SGLang's own processor: what a request brings is prepared."""

    async def process_mm_data_async(self, image_data: Sequence[Any], **_: Any) -> Any:
        """A copy of the request's own, as SGLang writes into what it gets, and responses share theirs."""
        (prepared,) = image_data
        return dataclasses.replace(prepared, mm_items=[copy.copy(item) for item in prepared.mm_items])


def prepared(model: Any, reading: Reading, placeholders: Tensor) -> Any:
    """What SGLang's processors make of a prompt, made of its reading.

    Args:
        model: of ``transformers``, for its positions and its dtype; it needs no weights.
        reading: of a prompt that has media.
        placeholders: int64 ``[K]``, ids of the tokens that features are put in place of.

    Returns:
        SGLang's ``MultimodalProcessorOutput``.
    """
    from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

    ids = reading.token_ids.tolist()
    items = [_item(item, at, model.dtype) for item, at in _placed(reading, placeholders)]
    positions, shift = _positions(model, reading)
    return MultimodalProcessorOutput(
        mm_items=items,
        input_ids=ids,
        padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(ids, items),
        mrope_positions=positions,
        mrope_position_delta=shift,
    )


def feature_bytes(prepared: Any) -> int:
    """What towers read of a prompt's media; 0 without (``None``)."""
    return sum(int(item.feature.nbytes) for item in prepared.mm_items) if prepared else 0


def _placed(reading: Reading, placeholders: Tensor) -> Iterator[tuple[MediaItem, Tensor]]:
    """Items, each with the positions int64 ``[N]`` of its features; every kind has a placeholder of its own."""
    for kind in sorted(reading.kinds):
        items = [item for item in reading.items if item.kind == kind]
        own = [item.token_ids[torch.isin(item.token_ids, placeholders)] for item in items]
        at = torch.isin(reading.token_ids, torch.cat(own)).nonzero()[:, 0]
        yield from zip(items, at.split([len(ids) for ids in own]))


def _item(item: MediaItem, at: Tensor, dtype: torch.dtype) -> Any:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    (read,) = _READ_BY_TOWERS & item.features.keys()
    others = {name: tensor for name, tensor in item.features.items() if name != read}
    made = MultimodalDataItem(
        modality=Modality[_MODALITIES[item.kind]],
        hash=_hash(item),
        offsets=_runs(at),
        feature=item.features[read].to(dtype),
        model_specific_data={**others, "audio_feature_lens": torch.tensor([len(at)])},
    )
    made.set_pad_value()
    return made


def _runs(at: Tensor) -> list[tuple[int, int]]:
    """First and last of each run of ascending positions without a gap."""
    ends = (at.diff() > 1).nonzero()[:, 0].tolist()
    firsts, lasts = [0, *(end + 1 for end in ends)], [*ends, len(at) - 1]
    return [(int(at[first]), int(at[last])) for first, last in zip(firsts, lasts)]


def _hash(item: MediaItem) -> int:
    """By which SGLang's caches know an item. Its own leaves out the shape: a plain colour would be one image in any."""
    digest = hashlib.sha256()
    for name, tensor in sorted(item.features.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8], "big")


def _positions(model: Any, reading: Reading) -> tuple[Tensor | None, Tensor | None]:
    """On each of a token's axes, int64 ``[3, L]``, and the next token's less ``L``; nothing for one axis alone."""
    compute = getattr(model.base_model, "get_rope_index", None)
    if compute is None:
        return None, None
    given = {"input_ids": reading.token_ids[None]} | {name: own[None] for name, own in reading.token_types.items()}
    given |= joined_features(reading.items)
    wanted = inspect.signature(compute).parameters
    positions, shift = compute(**{name: tensor for name, tensor in given.items() if name in wanted})
    return positions[:, 0], shift
