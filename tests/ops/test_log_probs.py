"""The chunked head equals the plain computation in value and gradient, and never holds all logits in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightrft.ops import log_probs_and_entropy

TOKENS, HIDDEN, VOCABULARY = 23, 6, 17


def plain(hidden: Tensor, targets: Tensor, head: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (head(hidden) / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, nn.Linear]:
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(VOCABULARY, (TOKENS,)), nn.Linear(HIDDEN, VOCABULARY).to(dtype)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
def test_equals_plain_log_softmax_in_value_and_gradient(temperature: float, chunk_tokens: int) -> None:
    hidden, targets, head = inputs()
    ours = log_probs_and_entropy(hidden, targets, head, temperature=temperature, chunk_tokens=chunk_tokens)
    theirs = plain(hidden, targets, head, temperature)
    weights = torch.randn(2, TOKENS, dtype=torch.float64)
    leaves = [hidden, *head.parameters()]
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad((out[0] * weights[0] + out[1] * weights[1]).sum(), leaves) for out in (ours, theirs)
    ]
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_gradient_of_each_output_equals_finite_differences() -> None:
    hidden, targets, head = inputs()
    for output in (0, 1):
        assert torch.autograd.gradcheck(
            lambda h, o=output: log_probs_and_entropy(h, targets, head, chunk_tokens=5)[o], (hidden,)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forbidden_tokens_add_nothing(dtype: torch.dtype) -> None:
    hidden, targets, head = inputs(dtype)
    forbidden = torch.zeros(VOCABULARY, dtype=dtype)
    forbidden[3] = -torch.inf
    targets[targets == 3] = 4
    rest = [i for i in range(VOCABULARY) if i != 3]
    log_p = head(hidden)[:, rest].log_softmax(-1)
    places = torch.tensor([rest.index(target) for target in targets.tolist()])
    theirs = log_p.gather(-1, places[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    ours = log_probs_and_entropy(hidden, targets, lambda h: head(h) + forbidden)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)
    # Gradients above 1, by which the largest finite number would overflow.
    loss = [(-3 * log_probs + 5 * entropy).sum() for log_probs, entropy in (ours, theirs)]
    mine, other = (torch.autograd.grad(one, [hidden, *head.parameters()]) for one in loss)
    for left, right in zip(mine, other):
        torch.testing.assert_close(left, right)


def test_a_drawn_token_that_is_forbidden_now_has_no_gradient_of_its_own() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    log_probs, _ = log_probs_and_entropy(logits, torch.tensor([2]), lambda h: h)
    assert float(log_probs.detach()) == -torch.inf
    (gradient,) = torch.autograd.grad(log_probs.clamp_min(-20).sum(), logits)
    assert not gradient.any()


def test_large_logits_overflow_nothing() -> None:
    logits = torch.tensor([[9e4, -9e4, 0.0], [50.0, 50.0, -3e38]], requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([0, 1]), lambda h: h)
    torch.testing.assert_close(log_probs, torch.tensor([0.0, -math.log(2)]))
    (log_probs.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()


def test_half_precision_gives_float32() -> None:
    hidden, targets, head = inputs(torch.bfloat16)
    log_probs, entropy = log_probs_and_entropy(hidden, targets, head, chunk_tokens=5)
    assert log_probs.dtype == entropy.dtype == torch.float32
    theirs = (head(hidden).float()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, theirs, rtol=1e-6, atol=1e-6)


def test_no_tokens_is_no_error() -> None:
    hidden, targets, head = inputs()
    log_probs, entropy = log_probs_and_entropy(hidden[:0], targets[:0], head)
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


class LargestFloat32(TorchDispatchMode):
    """Most elements of a float32 tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_all_logits_never_exist_in_float32_at_once() -> None:
    tokens, vocabulary, chunk = 64, 500, 8
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    head, targets = nn.Linear(HIDDEN, vocabulary).bfloat16(), torch.randint(vocabulary, (tokens,))
    with LargestFloat32() as seen:
        log_probs, entropy = log_probs_and_entropy(hidden, targets, head, chunk_tokens=chunk)
        (log_probs.sum() + entropy.sum()).backward()
    assert 0 < seen.largest <= chunk * vocabulary


@pytest.mark.parametrize("chunk_tokens", [8, 64])
def test_what_is_kept_for_the_backward_is_no_logits_but_a_lone_chunks(chunk_tokens: int) -> None:
    tokens, vocabulary = 64, 500
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    head, targets = nn.Linear(HIDDEN, vocabulary), torch.randint(vocabulary, (tokens,))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        log_probs_and_entropy(hidden, targets, head, chunk_tokens=chunk_tokens)
    logits = [size for size in kept if size >= chunk_tokens * vocabulary]
    assert len(logits) == (1 if chunk_tokens == tokens else 0)
