"""Vision-language models share rows out by the same way: images over borders of slices, three positions a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import packed_whole, sharpen
from on_slices import check_slices, gradient, loss_of, outputs
from ranks import on_ranks
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from lightrft.lightning_modules import ActorModule, packed_attention
from lightrft.ops import Packed

RANKS = 4
IMAGE = 11
# Two patches of 2 x 2 pixels a side make a token: 4 tokens and 8.
GRIDS = torch.tensor([[1, 4, 4], [1, 4, 8]])
# 25 tokens, 7 a slice on 4 ranks: images lie over borders, fill a slice, and end the row, where padding repeats one.
ROWS = [[3, 4, 5, *[IMAGE] * 4, 6, 7, 8, 9, 2], [5, 3, 2, 8, 4, *[IMAGE] * 8]]
TEXT: dict[str, Any] = {
    "vocab_size": 14, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 2, "out_hidden_size": 32,
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ({"rope_parameters": ROPE}, {"window_size": 8, "fullatt_block_indexes": [1]}),
    # Features of the tower enter the first two layers of the decoder too.
    "qwen3_vl": (
        {"head_dim": 8, "rope_parameters": ROPE | {"mrope_interleaved": True}},
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
}


def build(family: str, **options: Any) -> ActorModule:
    torch.manual_seed(0)
    text, vision = MODELS[family]
    config = AutoConfig.for_model(
        family, text_config=TEXT | text, vision_config=VISION | vision, image_token_id=IMAGE, video_token_id=12
    )
    model = sharpen(AutoModelForImageTextToText.from_config(config)).double()
    packed_attention.select(model, True, "actor")
    model.set_attn_implementation({"vision_config": "eager"})
    if options.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    actor = ActorModule(model="none", **options)
    actor.language_model = model
    return actor


def row_of_images(model: PreTrainedModel) -> Packed:
    packed = packed_whole([torch.tensor(row) for row in ROWS])
    patch = 3 * model.config.vision_config.temporal_patch_size * VISION["patch_size"] ** 2
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), patch, dtype=torch.float64)
    types = (packed.input_ids == IMAGE).long()
    packed.media = {"pixel_values": pixels, "image_grid_thw": GRIDS, "mm_token_type_ids": types}
    return packed


def plain(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Log-probs of the model's own forward, one sequence at a time."""
    found, patches = [], pixels.split(GRIDS.prod(-1).tolist())
    with packed_attention.plain(model):
        for row, grid, of_row in zip(ROWS, GRIDS, patches):
            ids = torch.tensor([row])
            logits = model(
                input_ids=ids,
                mm_token_type_ids=(ids == IMAGE).int(),
                pixel_values=of_row,
                image_grid_thw=grid[None],
                use_cache=False,
            ).logits[0, :-1]
            found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


def as_on_one_rank(family: str) -> None:
    dist.init_process_group("gloo")
    for checkpointing in (False, True):
        actor = build(family, checkpointing=checkpointing).train()
        packed = row_of_images(actor.transformer)
        (log_probs, _) = check_slices(actor, packed, (2, 4), 1e-8, 1e-6, sampled=False)
        torch.testing.assert_close(
            log_probs, plain(actor.transformer, packed.media["pixel_values"]), rtol=1e-6, atol=1e-6
        )
    every = gradient(actor, loss_of(outputs(actor, packed, sampled=False)))
    tower = sum(parameter.numel() for parameter in actor.transformer.base_model.visual.parameters())
    assert tower and every[:tower].norm() > 1e-3 * every.norm()  # images matter


@pytest.mark.parametrize("family", MODELS)
def test_outputs_and_gradients_are_those_of_one_rank(family: str) -> None:
    on_ranks(RANKS, as_on_one_rank, family)
