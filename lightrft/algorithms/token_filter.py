"""Which tokens carry a policy loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrft.algorithms.advantages import Gather

_ROUNDING = 1e-5  # nats


def top_entropy_mask(entropy: Tensor, mask: Tensor, fraction: float, gather: Gather) -> Tensor:
    """Tokens whose entropy is at or above the ``1 - fraction`` quantile of the optimizer step's (arXiv 2506.01939).

    Entropies closer than 1e-5 nats count as equal.

    Args:
        entropy: ``[B, T]`` nats.
        mask: bool ``[B, T]``, the trained tokens.
        fraction: share that is kept, in (0, 1]; more where entropies are equal.
        gather: the step is that of all ranks.

    Returns:
        bool ``[B, T]``, within ``mask``.
    """
    step = gather(entropy[mask]).sort().values
    if not len(step):
        return mask
    # Interpolated linearly between the two nearest, as torch.quantile does, which takes 16 million values at most.
    place = (len(step) - 1) * (1 - fraction)
    below = int(place)
    above = min(below + 1, len(step) - 1)
    # The first tokens of a group have one entropy, but for rounding, which may differ with the micro-batch.
    return mask & (entropy >= torch.lerp(step[below], step[above], place - below) - _ROUNDING)
