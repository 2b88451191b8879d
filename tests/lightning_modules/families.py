"""Small models of many families, and sequences to run through them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lightrft.ops import Packed, pack

Module = TypeVar("Module", bound=nn.Module)

LENGTHS = (6, 2, 11)
PLAIN: dict[str, Any] = {
    "vocab_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    # Its window is in the mask alone, which packed attention never builds.
    "qwen2_moe-sliding": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, **EXPERTS},
    "qwen3": {"head_dim": 16},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 3, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    # Latent attention: values are narrower than keys.
    "deepseek_v2": {
        "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
}  # fmt: skip
PADDED_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3},
    "bloom": {"n_layer": 2, "n_head": 2, "attention_dropout": 0.1},
    "nemotron": {},
    "lfm2": {"full_attn_idxs": [1], "block_multiple_of": 8},
    "jamba": {"mamba_d_state": 4, "use_mamba_kernels": False, "num_experts": 2},
}
# Attention of its own that sees across a packed row, worth 0.0008 nats at this size.
LEAKY: dict[str, dict[str, Any]] = {"xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2}}


def config_of(family: str) -> dict[str, Any]:
    """The family's configuration at this size."""
    own = (FAMILIES | PADDED_FAMILIES | LEAKY).get(family, {})
    model_type = family.split("-")[0]
    known = AutoConfig.for_model(model_type)
    return {"model_type": model_type, **{key: value for key, value in PLAIN.items() if hasattr(known, key)}, **own}


def sharpen(module: Module) -> Module:
    """Weights of a size at which every token before shows in the output; fresh ones hardly look back. Float32."""
    module.float()  # kernels of experts know no float64
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)
    return module


def sequences() -> list[Tensor]:
    """Ragged ids that all families have."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, 14, (length,), generator=generator) for length in LENGTHS]


def packed_whole(rows: list[Tensor]) -> Packed:
    """The sequences in one row, tokens 1.. of each to be predicted."""
    mask = torch.arange(max(map(len, rows)) - 1) < torch.tensor([len(row) - 1 for row in rows])[:, None]
    return pack(rows, torch.ones(len(rows), dtype=torch.int64), mask)
