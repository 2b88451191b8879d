"""Weights through buckets: whatever their sizes, each tensor arrives bit by bit; messages and exceptions do too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightrft.engines.buckets import Piece, packed, unpacked
from lightrft.engines.process import shared_memory
from lightrft.engines.process.messages import dumps, loads
from lightrft.samples import Prompt, Response

TENSORS = {
    "matrix": torch.randn(7, 5),
    "transposed": torch.randn(4, 6).t(),
    "half": torch.randn(33).bfloat16(),
    "scalar": torch.tensor(3.0),
    "nothing": torch.zeros(0, 4),
    "integers": torch.arange(9),
    "flags": torch.tensor([True, False, True]),
    "eighths": torch.randn(16).to(torch.float8_e4m3fn),
}


def same(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


@pytest.mark.parametrize("size", [1, 7, 64, 280, 4096])
@pytest.mark.parametrize("count", [1, 2])
def test_tensors_of_any_size_kind_and_layout_arrive(size, count):
    buckets = [torch.zeros(size, dtype=torch.uint8) for _ in range(count)]
    filled = packed(TENSORS.items(), buckets)
    done: list[bool] = []

    def receive() -> list[Piece] | None:
        pieces = next(filled, None)
        assert pieces is None or sum(piece.size for piece in pieces) <= size
        return pieces

    found = dict(unpacked(receive, lambda: done.append(True), buckets))
    assert list(found) == list(TENSORS)
    assert all(same(found[name], tensor) for name, tensor in TENSORS.items())
    assert done


def test_a_tensor_outlives_its_bucket():
    buckets = [torch.zeros(64, dtype=torch.uint8)]
    source: Iterator[tuple[str, Tensor]] = iter([("a", torch.ones(16)), ("b", torch.full((16,), 2.0))])
    filled = packed(source, buckets)
    found = dict(unpacked(lambda: next(filled, None), lambda: None, buckets))
    assert found["a"].tolist() == [1.0] * 16


def test_memory_is_seen_by_both_and_given_back():
    file = os.memfd_create("test")
    cpu = torch.device("cpu")
    with shared_memory.given(4096, cpu, file) as (ours, key), shared_memory.taken(4096, cpu, file, key) as theirs:
        ours[7] = 42
        assert theirs[7] == 42
        assert os.fstat(file).st_size == 4096
    assert os.fstat(file).st_size == 0
    os.close(file)


def test_messages_keep_tensors_apart_and_everything_else_as_it_is():
    response = Response(torch.tensor([1, 2]), torch.tensor([-0.5, -1.5]), "ab", "stop", 3, 4)
    other = Response(torch.zeros(0, dtype=torch.int64), torch.zeros(0), "", "abort")
    prompt = Prompt("p", torch.tensor([5]), "c", record={"n": [1, None], "matrix": torch.eye(2)})
    (one, two), again = loads(dumps(([response, other], prompt)))
    assert (one.text, one.weight_version, two.finish_reason) == ("ab", 3, "abort")
    assert same(one.token_ids, response.token_ids) and same(one.log_probs, response.log_probs)
    assert two.token_ids.shape == (0,) and again.record["n"] == [1, None]
    assert same(again.record["matrix"], torch.eye(2))
    assert one.token_ids.untyped_storage().nbytes() == 16  # not that of all tensors
