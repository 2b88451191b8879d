"""What vLLM is asked, and what its answers say: sampling parameters, multimodal prompts, log-probs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrft.samples import Sampling


def sampling_params(sampling: Sampling, seed: int, stop_ids: frozenset[int], stream: bool) -> Any:
    """vLLM's ``SamplingParams`` for one response.

    Args:
        sampling: how it is drawn; stop strings are ours to find, ``fire`` is no single request's.
        seed: of its own stream.
        stop_ids: every id that ends it.
        stream: whether tokens are wanted as they come, rather than all at the end.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=sampling.max_new_tokens,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,  # ends of sequence are among the ids
        logprobs=0,  # of the token that is drawn, and of no other
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    params.temperature = sampling.temperature  # the constructor would refuse what is above 2, as FIRE's is
    return params


def scoring_params() -> Any:
    """vLLM's ``SamplingParams`` for the log-probs of a prompt, which cost one token more."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def request(token_ids: Tensor, media: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A prompt as vLLM takes it.

    Args:
        token_ids: one placeholder for each of the media, which vLLM expands.
        media: decoded, by kind (``image``, ``audio``).
    """
    asked: dict[str, Any] = {"prompt_token_ids": token_ids.tolist()}
    return {**asked, "multi_modal_data": dict(media)} if media else asked


def flat(log_probs: Any) -> list[float]:
    """Of each token in turn: vLLM's flat log-probs, with one number a position."""
    return list(log_probs.logprobs)


def prompt_log_probs(log_probs: Any) -> Tensor:
    """float32 ``[L - 1]`` of a prompt of ``L`` tokens; vLLM's first position is empty."""
    return torch.tensor(flat(log_probs), dtype=torch.float32)


def ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)
