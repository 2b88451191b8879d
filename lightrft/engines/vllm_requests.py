"""What vLLM is asked, and what its answers say: sampling parameters, multimodal prompts, log-probs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrft.samples import Prompt, Sampling


def sampling_params(sampling: Sampling, seeds: Sequence[int], stop_ids: frozenset[int], stream: bool) -> list[Any]:
    """vLLM's ``SamplingParams`` for one response from each seed.

    Args:
        sampling: how they are drawn; stop strings are ours to find, ``fire`` is no single request's.
        seeds: of their own streams.
        stop_ids: every id that ends them.
        stream: whether tokens are wanted as they come, rather than all at the end.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    common = SamplingParams(
        max_tokens=sampling.max_new_tokens,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,  # ends of sequence are among the ids
        logprobs=0,  # of the token that is drawn, and of no other
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    common.temperature = sampling.temperature  # the constructor would refuse what is above 2, as FIRE's is
    params = [copy.copy(common) for _ in seeds]
    for one, seed in zip(params, seeds):
        one.seed = seed
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


def request(prompt: Prompt) -> dict[str, Any]:
    """A prompt as vLLM takes it: token ids, and media by kind."""
    asked: dict[str, Any] = {"prompt_token_ids": prompt.token_ids.tolist()}
    if prompt.media:
        kinds = {"image": prompt.media.images, "audio": prompt.media.audios, "video": prompt.media.videos}
        asked["multi_modal_data"] = {kind: list(items) for kind, items in kinds.items() if items}
    return asked


def flat(log_probs: Any) -> list[float]:
    """Of each token in turn: vLLM's flat log-probs, with one number a position."""
    return list(log_probs.logprobs)


def prompt_log_probs(log_probs: Any) -> Tensor:
    """float32 ``[L - 1]`` of a prompt of ``L`` tokens; vLLM's first position is empty."""
    return torch.tensor(flat(log_probs), dtype=torch.float32)
