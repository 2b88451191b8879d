"""Packed attention equals attention of each segment alone, written from its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightrft.ops import varlen_attention

LENGTHS = (5, 1, 9, 3)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(q k^T scale + mask) v of one segment, heads apart."""
    groups, length = q.shape[1] // k.shape[1], len(q)
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // groups].T * scale
        for i in range(length):
            for j in range(length):
                if j > i or (window is not None and i - j >= window):
                    scores[i, j] = -torch.inf
        heads.append(scores.softmax(-1) @ v[:, head // groups])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("value_width", [8, 5])
def test_equals_each_segment_alone_in_value_and_gradient(kv_heads: int, window: int | None, value_width: int) -> None:
    total = sum(LENGTHS)
    shapes = ((total, 4, 8), (total, kv_heads, 8), (total, kv_heads, value_width))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    ours = varlen_attention(*inputs, bounds.to(torch.int32), scale=0.3, window=window)
    parts = zip(*(x.split(LENGTHS) for x in inputs))
    expected = torch.cat([reference(q, k, v, 0.3, window) for q, k, v in parts])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_nothing_is_seen_across_segments() -> None:
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    inputs = [torch.randn(9, 2, 8, requires_grad=True) for _ in range(3)]
    first = varlen_attention(*inputs, bounds, scale=0.3)[:5]
    for gradient in torch.autograd.grad(first.sum(), inputs):
        assert gradient[:5].any() and not gradient[5:].any()


@pytest.mark.parametrize("window", [None, 2])
def test_under_autocast_float32_queries_become_its_dtype(window: int | None) -> None:
    """Norms leave queries and keys in float32 beside half-precision values."""
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = varlen_attention(q, k, half[2], bounds, scale=0.3, window=window)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, varlen_attention(*half, bounds, scale=0.3, window=window), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 4])
def test_the_gpu_kernel_equals_the_padded_way(kv_heads: int, window: int | None) -> None:
    total, bounds = sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    shapes = ((total, 4, 64), (total, kv_heads, 64), (total, kv_heads, 64))
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for shape in shapes]
    plain = [x.detach().cpu().double().requires_grad_() for x in inputs]
    ours = varlen_attention(*inputs, bounds.cuda(), scale=0.125, window=window)
    expected = varlen_attention(*plain, bounds, scale=0.125, window=window)
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(expected)
    mine = torch.autograd.grad((ours * weight.cuda().to(ours)).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), plain)
    for left, right in zip(mine, theirs):
        torch.testing.assert_close(left.cpu().double(), right, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_the_gpu_kernel_takes_what_autocast_mixes_and_narrow_values() -> None:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()
    q, k, v = (torch.randn(sum(LENGTHS), 4, 64, device="cuda") for _ in range(3))
    with torch.autocast("cuda", dtype=torch.bfloat16), profile(activities=[ProfilerActivity.CPU]) as seen:
        mixed = varlen_attention(q, k, v.bfloat16(), bounds, scale=0.125)
    assert any("varlen" in event.key or "flash" in event.key for event in seen.key_averages())
    torch.testing.assert_close(mixed.float(), varlen_attention(q, k, v, bounds, scale=0.125), rtol=2e-2, atol=2e-2)
    narrow = varlen_attention(q.bfloat16(), k.bfloat16(), v[..., :48].bfloat16(), bounds, scale=0.125)
    torch.testing.assert_close(narrow.float(), mixed[..., :48].float(), rtol=2e-2, atol=2e-2)
