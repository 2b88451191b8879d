"""What vLLM is asked, and what its answers say: sampling parameters, multimodal prompts, log-probs, responses."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrft.engines.base import EngineError, WakePart
from lightrft.engines.flat import from_list
from lightrft.engines.stopping import Detokenizer, Tail, before_stop
from lightrft.samples import Prompt, Response, Sampling

# A finite number, as vLLM's server takes, is an outlier by which vLLM's top-p kernel for GPUs misjudges what is
# likely, and keeps every token of a small vocabulary.
_NEVER = -math.inf
# What an engine's parts are called when they are woken.
TAGS: dict[WakePart, str] = {"weights": "weights", "cache": "kv_cache"}


def drawing(sampling: Sampling, stop_ids: frozenset[int], never_drawn: Sequence[int] = ()) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``, all but the seed, and the temperature, which it limits to 2.

    Args:
        sampling: how responses are drawn; stop strings are ours to find, ``fire`` is no single request's.
        stop_ids: every id that ends them.
        never_drawn: ids that are not drawn.
    """
    return {
        "max_tokens": sampling.max_new_tokens,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,  # ends of sequence are among the ids
        "logprobs": 0,  # of the token that is drawn, and of no other
        "flat_logprobs": True,
        "detokenize": False,
        "logit_bias": dict.fromkeys(never_drawn, _NEVER) or None,
    }


# Arguments for the log-probs of a prompt, which cost one token more.
SCORING: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}


def sampling_params(
    sampling: Sampling, seeds: Sequence[int], stop_ids: frozenset[int], stream: bool, never_drawn: Sequence[int]
) -> list[Any]:
    """vLLM's ``SamplingParams`` for one response from each seed.

    Args:
        sampling, stop_ids, never_drawn: as for :func:`drawing`.
        seeds: of their own streams.
        stream: whether tokens are wanted as they come, rather than all at the end.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    common = SamplingParams(**drawing(sampling, stop_ids, never_drawn), output_kind=kind, skip_clone=True)
    common.temperature = sampling.temperature  # the constructor would refuse what is above 2, as FIRE's is
    common.stop_token_ids = stop_ids  # a set: vLLM looks up every token, in a list one id after the other
    params = [copy.copy(common) for _ in seeds]
    for one, seed in zip(params, seeds):
        one.seed = seed
    return params


def scoring_params() -> Any:
    """vLLM's ``SamplingParams`` for the log-probs of a prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**SCORING, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)


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


class Answer:
    """One request's answer as it grows.

    Args:
        stops: stop strings that are no special tokens; there may be none.
        detokenizer: what decodes.

    Attributes:
        tokens: so far.
        log_probs: of each.
        finish_reason: ``abort`` until another is known.
        prompt_log_probs: float32 ``[L - 1]`` of the prompt, where it is scored.
    """

    def __init__(self, stops: Sequence[str], detokenizer: Detokenizer) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: Any = "abort"
        self.prompt_log_probs = torch.zeros(0)
        self._tail = Tail(stops, detokenizer) if stops else None

    def take(self, tokens: Sequence[int], log_probs: Sequence[float], finish_reason: str | None) -> bool:
        """Add what vLLM gives; whether a stop string has ended the response."""
        if self.finish_reason == "stop":  # of before it was aborted
            return False
        if self._tail is not None:
            for at, token in enumerate(tokens):
                if self._tail.completed_by(token):
                    self.tokens += tokens[: at + 1]
                    self.log_probs += log_probs[: at + 1]
                    self.finish_reason = "stop"
                    return True
        self.tokens += tokens
        self.log_probs += log_probs
        if finish_reason is not None:
            self.finish_reason = finish_reason
        return False


def responses(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    stops: Sequence[str],
    detokenizer: Detokenizer,
    weight_version: int,
) -> list[list[Response]]:
    """Answers as responses, by prompt.

    Args:
        prompts, sampling, seeds: as for :meth:`lightrft.engines.Engine.generate`.
        answers: one for each seed of the first prompt, then of the second, and so on.
        stops: stop strings that are no special tokens.
        detokenizer: what decodes.
        weight_version: of the weights that sampled.

    Raises:
        EngineError: log-probs that are not finite; names the prompt.
    """
    texts = detokenizer.decode_all([answer.tokens for answer in answers])
    drawn = iter(zip(answers, texts))
    groups = []
    for prompt, own in zip(prompts, seeds):
        group = []
        for seed, (answer, text) in zip(own, drawn):
            log_probs = from_list(answer.log_probs, torch.float32)
            if sampling.temperature == 0:  # vLLM gives a greedy token the log-prob it had before others were ruled out
                log_probs.zero_()
            if not bool(log_probs.isfinite().all()):
                raise EngineError(
                    f"The model's logits for prompt {prompt.uid!r} are not finite under weights of version "
                    f"{weight_version}; training has diverged, or the engine's dtype is too narrow."
                )
            token_ids = from_list(answer.tokens, torch.int64)
            text = before_stop(text, stops)
            group.append(Response(token_ids, log_probs, text, answer.finish_reason, weight_version, seed))
        groups.append(group)
    return groups
