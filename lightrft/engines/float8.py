"""Weights in 8 bits, a scale for each row: what vLLM makes of them as it loads (its ``fp8_per_channel``)."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_SCALE = 1 / (_LARGEST * 512)


def per_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix: each row by its largest magnitude.

    Args:
        weight: floating ``[N, K]``.

    Returns:
        float8_e4m3fn ``[N, K]`` and float32 ``[N]``, whose product is the weight; the bits that vLLM's kernel gives.
    """
    values = weight.float()
    # By a tensor: by a number torch multiplies with the reciprocal, which rounds otherwise.
    scale = (values.abs().amax(-1) / torch.tensor(_LARGEST, device=weight.device)).clamp_(min=_SMALLEST_SCALE)
    return (values / scale[:, None]).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale
