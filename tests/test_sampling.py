"""Sampling: what is refused, and what a checkpoint keeps of it."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from lightrft.samples import FIRE, Prompt, Response, Rollout, Sampling


def rollout(sampling: Sampling) -> Rollout:
    response = Response(torch.tensor([4]), torch.tensor([-0.5]), "b", "stop")
    return Rollout([Prompt("p", torch.tensor([3]), "a")], [[response]], sampling)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file that may hold nothing but tensors, numbers, strings, lists, tuples and dicts."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.0}, r"sampling\.fire\.temperature is 0\.0; it must be above 0 and finite"),
        ({"temperature": -1.0}, r"sampling\.fire\.temperature is -1\.0"),
        ({"temperature": math.inf}, r"sampling\.fire\.temperature is inf"),
        ({"temperature": math.nan}, r"sampling\.fire\.temperature is nan"),
        ({"top_k": 0}, r"sampling\.fire\.top_k is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_a_hot_first_token_out_of_range_is_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FIRE(**options)


def test_greedy_decoding_with_a_hot_first_token_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0, but .*fire is set: greedy .* no hot first token; set"):
        Sampling(temperature=0, fire=FIRE())


@pytest.mark.parametrize("fire", [None, FIRE(), FIRE(temperature=30.0, top_k=1)], ids=str)
def test_sampling_comes_back_from_a_rollouts_state(fire: FIRE | None) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, stop=("end", "."), stop_token_ids=(7,), fire=fire)
    assert Rollout.from_state_dict(saved(rollout(sampling).state_dict())).sampling == sampling


def test_a_state_from_before_hot_first_tokens_has_none() -> None:
    state = rollout(Sampling(top_k=5)).state_dict()
    del state["sampling"]["fire"]
    assert Rollout.from_state_dict(state).sampling == Sampling(top_k=5)
