"""Prompts and responses come back from their flat tensors as they went in, whatever they hold."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.engines.flat import flatten, flatten_requests, unflatten, unflatten_requests
from lightrft.samples import Media, Prompt, Response

SIGNED = st.integers(-(2**63), 2**63 - 1)
SEEDS = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters())  # lone surrogates too


@st.composite
def responses(draw: Any) -> Response:
    pairs = draw(st.lists(st.tuples(SIGNED, st.floats(width=32)), max_size=6))
    return Response(
        token_ids=torch.tensor([token for token, _ in pairs], dtype=torch.int64),
        log_probs=torch.tensor([value for _, value in pairs], dtype=torch.float32),
        text=draw(TEXT),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        weight_version=draw(st.integers(-1, 2**40)),
        seed=draw(SEEDS),
        segments=draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), max_size=3)),
    )


def exactly(response: Response) -> list[Any]:
    """Comparable, NaN and signed zeros by their bits."""
    state = response.state_dict()
    bits = state.pop("log_probs")
    return [bits.dtype, bits.view(torch.int32).tolist(), state.pop("token_ids").tolist(), state]


@given(st.lists(responses(), max_size=5))
def test_responses_come_back_to_the_bit(given_ones: list[Response]) -> None:
    flat = flatten(given_ones)
    assert list(map(exactly, unflatten(flat))) == list(map(exactly, given_ones))
    assert {tensor.ndim for tensor in flat.values()} == {1}
    empty = flatten([])
    assert {name: tensor.dtype for name, tensor in flat.items()} == {n: tensor.dtype for n, tensor in empty.items()}


@given(st.lists(st.tuples(TEXT, st.lists(SIGNED, max_size=6), st.lists(SEEDS, max_size=4)), max_size=5))
def test_requests_come_back(asked: list[tuple[str, list[int], list[int]]]) -> None:
    given_ones = [Prompt(uid, torch.tensor(ids, dtype=torch.int64), "text") for uid, ids, _ in asked]
    prompts, seeds = unflatten_requests(flatten_requests(given_ones, [own for _, _, own in asked]))
    assert [(p.uid, p.token_ids.tolist(), own) for p, own in zip(prompts, seeds)] == asked
    assert len(prompts) == len(seeds) == len(asked)


def test_media_come_back() -> None:
    image = Media(images=("a.png", b"\x00bytes"), videos=("v.mp4",))
    asked = [Prompt("seen", torch.tensor([1]), "", media=image), Prompt("blind", torch.tensor([2]), "")]
    prompts, _ = unflatten_requests(flatten_requests(asked, [[1], [2]]))
    assert [prompt.media for prompt in prompts] == [image, Media()]


def test_one_response_does_not_keep_the_memory_of_all() -> None:
    many = [Response(torch.arange(100), torch.zeros(100), "", "stop") for _ in range(50)]
    one = unflatten(flatten(many))[3]
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    assert len(file.getvalue()) < 5000  # 60000 bytes are all of them
    assert one.token_ids.untyped_storage().nbytes() == 800


@pytest.mark.parametrize("scored", [{"reward": 0.0}, {"reward_parts": {"a": 1.0}}, {"dropped": True}])
def test_what_would_be_lost_is_refused(scored: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="scored already"):
        flatten([Response(torch.tensor([1]), torch.zeros(1), "", "stop", **scored)])
