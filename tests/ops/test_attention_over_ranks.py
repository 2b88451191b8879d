"""Attention over a row that lies on several ranks equals attention over the row, in value and in gradient."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor

from lightrft.ops import check_heads, sequence_parallel_attention, sum_of_parts, varlen_attention
from lightrft.ops.sequence_parallel import _by_head, _by_rank
from lightrft.strategies import Layout

RANKS = 4
LENGTHS = (5, 1, 9, 3, 2)  # 20 tokens: 1, 2 and 4 slices, whose borders are not those of the segments


@given(
    degree=st.integers(1, 6),
    share=st.integers(1, 4),
    heads=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3),
)
def test_trading_tokens_for_heads_gives_each_rank_its_heads_of_the_whole_row(
    degree: int, share: int, heads: list[tuple[int, int]]
) -> None:
    whole = [torch.randn(degree * share, h * degree, width) for h, width in heads]
    slices = [[x[rank * share : (rank + 1) * share] for x in whole] for rank in range(degree)]
    sent = torch.stack([_by_rank(states, degree) for states in slices])
    for rank in range(degree):  # all-to-all: block i of every rank goes to rank i
        found = _by_head(sent[:, rank], slices[rank], degree)
        for x, one, (h, _) in zip(whole, found, heads):
            assert torch.equal(one, x[:, rank * h : (rank + 1) * h])


def on_slices(degrees: tuple[int, ...]) -> None:
    dist.init_process_group("gloo")
    for degree in degrees:
        group = Layout(RANKS, dist.get_rank(), degree).mesh("cpu").get_group("sequence")
        # 6 of 12 heads on 4 ranks: neither divides the other.
        for heads, kv_heads, window in itertools.product((4, 12), (1, 2, 4, 6), (None, 4)):
            if heads % kv_heads == 0:
                check_attention(group, heads, kv_heads, window, 5 if kv_heads == 2 else 8, torch.float64)
        check_attention(group, 4, 2, None, 8, torch.bfloat16)
        check_autocast(group)
        check_sum(group)


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def check_attention(
    group: Any, heads: int, kv_heads: int, window: int | None, width: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    total, bounds = sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    *inputs, weight = drawn(
        (total, heads, 8), (total, kv_heads, 8), (total, kv_heads, width), (total, heads, width), dtype=dtype
    )
    *inputs, weight = (x.detach().to(device).requires_grad_() for x in (*inputs, weight))
    expected = varlen_attention(*inputs, bounds, scale=0.3, window=window)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    own = [x.detach().chunk(degree)[rank].clone().requires_grad_() for x in inputs]
    out = sequence_parallel_attention(*own, bounds, group, scale=0.3, window=window)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(out, expected.chunk(degree)[rank], **close)
    for mine, whole in zip(torch.autograd.grad((out * weight.chunk(degree)[rank]).sum(), own), gradients):
        torch.testing.assert_close(mine, whole.chunk(degree)[rank], **close)


def check_autocast(group: Any) -> None:
    """Norms leave queries and keys in float32 beside half-precision values."""
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32)
    q, k, v = drawn((20, 4, 8), (20, 4, 8), (20, 4, 8), dtype=torch.float32)
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = varlen_attention(q, k, v.bfloat16(), bounds, scale=0.3)
        own = [x.chunk(degree)[rank] for x in (q, k, v.bfloat16())]
        out = sequence_parallel_attention(*own, bounds, group, scale=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, whole.chunk(degree)[rank], rtol=0, atol=0)


def check_sum(group: Any) -> None:
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    part = torch.tensor([1.0, 10.0 * rank], requires_grad=True)
    total = sum_of_parts(part, group)
    assert total.tolist() == [degree, 10 * sum(range(degree))]
    (total * torch.tensor([2.0, 3.0])).sum().backward()
    assert part.grad is not None and part.grad.tolist() == [2.0, 3.0]


def test_a_row_on_1_2_and_4_ranks_equals_the_whole_row() -> None:
    on_ranks(RANKS, on_slices, (1, 2, 4))


def on_gpus() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    group = Layout(2, dist.get_rank(), 2).mesh("cuda").get_group("sequence")
    for kv_heads, window in itertools.product((1, 2, 4), (None, 4)):
        check_attention(group, 4, kv_heads, window, 8, torch.bfloat16, "cuda")
    part = torch.ones(3, device="cuda", requires_grad=True)
    assert sum_of_parts(part, group).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.gpu
def test_the_gpu_kernel_and_nccl_give_the_whole_row_too() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    on_ranks(2, on_gpus)


def test_heads_that_cannot_be_shared_out_are_refused_with_the_numbers() -> None:
    check_heads(12, 4)
    with pytest.raises(ValueError, match=r"14 attention heads .* 4 ranks; .*sequence_parallel_size .*\(1, 2, 7, 14\)"):
        check_heads(14, 4)


@pytest.mark.parametrize("degree", [0, 3, 8])
def test_a_degree_that_does_not_divide_the_ranks_is_refused_with_the_numbers(degree: int) -> None:
    with pytest.raises(ValueError, match=rf"sequence_parallel_size={degree} .* 4 rank.* divisor"):
        Layout(4, 0, degree)
