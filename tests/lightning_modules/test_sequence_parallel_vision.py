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


class VisionActor(ActorModule):
    """The actor over a model that is handed to it, with the images of the row."""

    def attach(self, model: PreTrainedModel, pixels: Tensor) -> VisionActor:
        self.language_model, self.pixels = model, pixels
        return self

    def _packed_hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        out = self.transformer.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids,
            cu_seq_lens_q=cu_seqlens,
            pixel_values=self.pixels,
            image_grid_thw=GRIDS,
            use_cache=False,
        )
        return out.last_hidden_state[0]


def build(family: str, **options: Any) -> VisionActor:
    torch.manual_seed(0)
    text, vision = MODELS[family]
    config = AutoConfig.for_model(
        family, text_config=TEXT | text, vision_config=VISION | vision, image_token_id=IMAGE, video_token_id=12
    )
    model = sharpen(AutoModelForImageTextToText.from_config(config)).double()
    packed_attention.select(model, True, "actor")  # registers
    model.set_attn_implementation({"text_config": packed_attention.PACKED_ATTENTION, "vision_config": "eager"})
    patch = 3 * model.config.vision_config.temporal_patch_size * VISION["patch_size"] ** 2
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), patch, dtype=torch.float64)
    if options.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return VisionActor(model="none", **options).attach(model, pixels)


def positions_of(model: PreTrainedModel, row: list[int], grid: Tensor) -> Tensor:
    """``[3, 1, L]`` by the model's own method."""
    ids = torch.tensor([row])
    found, _ = model.base_model.get_rope_index(ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=grid[None])
    return found


def plain(actor: VisionActor) -> Tensor:
    """Log-probs of the model's own forward, one sequence at a time."""
    model = actor.transformer
    used = {"text_config": packed_attention.PACKED_ATTENTION, "vision_config": "eager"}
    model.set_attn_implementation("eager")
    found, patches = [], actor.pixels.split(GRIDS.prod(-1).tolist())
    for row, grid, pixels in zip(ROWS, GRIDS, patches):
        ids = torch.tensor([row])
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            pixel_values=pixels,
            image_grid_thw=grid[None],
            use_cache=False,
        ).logits[0, :-1]
        found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    model.set_attn_implementation(used)
    return torch.cat(found)


def as_on_one_rank(family: str) -> None:
    dist.init_process_group("gloo")
    for checkpointing in (False, True):
        actor = build(family, checkpointing=checkpointing).train()
        packed = packed_whole([torch.tensor(row) for row in ROWS])
        packed.position_ids = torch.cat(
            [positions_of(actor.transformer, row, grid) for row, grid in zip(ROWS, GRIDS)], dim=-1
        )
        (log_probs, _) = check_slices(actor, packed, (2, 4), 1e-8, 1e-6)
        torch.testing.assert_close(log_probs, plain(actor), rtol=1e-6, atol=1e-6)
    every = gradient(actor, loss_of(outputs(actor, packed)))
    tower = sum(parameter.numel() for parameter in actor.transformer.base_model.visual.parameters())
    assert tower and every[:tower].norm() > 1e-3 * every.norm()  # images matter


@pytest.mark.parametrize("family", MODELS)
def test_outputs_and_gradients_are_those_of_one_rank(family: str) -> None:
    on_ranks(RANKS, as_on_one_rank, family)
