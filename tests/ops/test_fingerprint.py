"""Fingerprints of tensors."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.ops.fingerprint import Fingerprint, Fingerprints, fingerprint, joined
from lightrft.ops.shard import Shard

module = importlib.import_module("lightrft.ops.fingerprint")  # the package's name of it is the function's
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int64]


def sample(dtype: torch.dtype, numel: int = 300) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    return (values * (1 if dtype.is_floating_point else 50)).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_single_bit_changes_the_checksum(dtype):
    before = fingerprint(sample(dtype))
    width = bits(sample(dtype)).element_size() * 8
    for position in (0, 1, 150, 299):
        for bit in range(width):
            changed = sample(dtype)
            view = bits(changed)
            one = 1 << bit if bit < width - 1 or dtype.itemsize == 1 else -(1 << bit)
            view[position] ^= torch.tensor(one, dtype=view.dtype)
            assert fingerprint(changed).checksum != before.checksum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_swap_of_two_values_is_seen(dtype):
    tensor = sample(dtype)
    first = tensor[3].clone()
    other = int((bits(tensor) != bits(tensor)[3]).nonzero()[-1])
    tensor[3], tensor[other] = tensor[other].clone(), first
    assert fingerprint(tensor) != fingerprint(sample(dtype))


@given(st.integers(0, 4095), st.integers(0, 4095), st.integers(-(2**15), 2**15 - 1), st.integers(-(2**15), 2**15 - 1))
def test_a_swap_is_seen_wherever_the_two_values_are(first, second, value, other):
    tensor = torch.zeros(4096, dtype=torch.int16)
    tensor[first], tensor[second] = value, other
    before = fingerprint(tensor)
    tensor[first], tensor[second] = tensor[second].clone(), tensor[first].clone()
    assert (fingerprint(tensor) != before) == (tensor[first] != tensor[second])


@pytest.mark.parametrize("length", [64, 1024, 2048])
def test_a_swap_of_two_blocks_that_sum_alike_is_seen(length):
    block = torch.arange(length, dtype=torch.int16)
    assert fingerprint(torch.cat([block, block.flip(0)])) != fingerprint(torch.cat([block.flip(0), block]))


def test_many_are_read_together_and_as_they_were_when_taken():
    prints = Fingerprints()
    tensor = sample(torch.float32)
    prints.add("first", tensor)
    tensor += 1
    prints.add("second", tensor)
    prints.add("part", tensor[:150], Shard((300,), 0, 0, 2))
    expected = {"first": fingerprint(sample(torch.float32)), "second": fingerprint(tensor)}
    assert prints.read() == expected | {"part": fingerprint(tensor[:150])}
    assert Fingerprints().read() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_a_gpu_finds_the_same_numbers(dtype, dim):
    whole = sample(dtype, 96 * 1000).view(96, 1000)
    shard = None if dim is None else Shard((96, 1000), dim, 1, 2)
    part = whole if shard is None else shard.of(whole)
    there, here = fingerprint(part.cuda(), shard), fingerprint(part, shard)
    assert there == here and there.difference(here) == pytest.approx(0, abs=1e-6)


def test_without_triton_a_gpu_takes_torch_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lightrft.ops.fingerprint_kernel", raising=False)
    monkeypatch.delattr("lightrft.ops.fingerprint_kernel", raising=False)
    with pytest.warns(UserWarning, match="take longer on cuda:0, where Triton does not work"):
        assert module.kernel_on.__wrapped__(torch.device("cuda:0")) is None
    assert module.kernel_on(torch.device("cpu")) is None


def test_negative_zero_is_not_zero():
    assert fingerprint(torch.zeros(4)).checksum != fingerprint(-torch.zeros(4)).checksum


def test_chunks_do_not_show(monkeypatch):
    whole = fingerprint(sample(torch.bfloat16, 10_000))
    monkeypatch.setattr(module, "_CPU_CHUNK", 2048)
    pieces = fingerprint(sample(torch.bfloat16, 10_000))
    assert (pieces.checksum, pieces.numel) == (whole.checksum, whole.numel)
    assert pieces.projection == pytest.approx(whole.projection)


def test_strides_and_gradients_do_not_matter_but_values_by_position_do():
    matrix = torch.arange(12.0).view(3, 4)
    assert fingerprint(matrix.t()) == fingerprint(matrix.t().contiguous())
    assert fingerprint(matrix.t()) != fingerprint(matrix)
    assert fingerprint(matrix.clone().requires_grad_()) == fingerprint(matrix)


@given(st.floats(1e-6, 1e3), st.integers(0, 299))
def test_the_difference_measures_a_change_of_one_value(change, position):
    tensor = sample(torch.float64)
    before = fingerprint(tensor)
    tensor[position] += change
    difference = before.difference(fingerprint(tensor))
    assert 0 < difference <= change * (1 + 1e-6) + 1e-9
    assert before.difference(before) == 0


def test_empty_scalar_and_not_a_number_have_fingerprints():
    assert fingerprint(torch.zeros(0)) == Fingerprint(0, 0.0, 0)
    assert fingerprint(torch.tensor(2.5)).numel == 1
    assert fingerprint(torch.tensor([torch.nan])).checksum == fingerprint(torch.tensor([torch.nan])).checksum


def test_the_numbers_are_the_same_in_every_process_and_version():
    print_ = fingerprint(torch.arange(-8, 8, dtype=torch.float32))
    assert print_.checksum == 17698239176723398656


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_parts_of_a_tensor_join_to_the_fingerprint_of_the_whole(dtype, dim, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 64)
    monkeypatch.setattr(module, "_ROW", 32)
    whole = sample(dtype, 4 * 6 * 12).view(4, 6, 12)
    shards = [Shard((4, 6, 12), dim, index, 2) for index in range(2)]
    parts = [fingerprint(shard.of(whole), shard) for shard in shards]
    assert joined(parts) == fingerprint(whole)
    assert joined(parts).difference(fingerprint(whole)) == pytest.approx(0, abs=1e-9)
    assert joined(parts) != joined(fingerprint(shard.of(whole), other) for shard, other in zip(shards, shards[::-1]))
    assert all(shard.of(whole).shape == shard.shape for shard in shards)


def test_a_dimension_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="6 elements cannot be cut into 4"):
        Shard((4, 6), 1, 0, 4)
