"""The fingerprint's kernel against torch's operations: on a GPU, and on a CPU in Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/ops/test_fingerprint_kernel.py
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from lightrft.ops.fingerprint import Fingerprint, Fingerprints, fingerprint

triton = pytest.importorskip("triton")
from lightrft.ops import fingerprint_kernel as kernel  # noqa: E402

module = importlib.import_module("lightrft.ops.fingerprint")  # the package's name of it is the function's
INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = list(kernel._VALUES)
SIZES = [0, 1, 7, 1023, 1024, 1025, 9 * 1024, 20_001]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    """On which all whole tensors are the kernel's."""
    monkeypatch.setattr(module, "kernel_on", lambda device: kernel)
    return torch.device(request.param)


def sample(dtype: torch.dtype, numel: int, device: torch.device) -> torch.Tensor:
    """Of all bit patterns but those that are huge, infinite or not a number."""
    bits = torch.randint(-128, 128, (numel * dtype.itemsize,), dtype=torch.int8)
    if dtype == torch.bool:
        return (bits > 0).to(device)
    if dtype.is_floating_point:
        values = bits.view(dtype).double().nan_to_num(0.5, 0.5, 0.5)
        return values.clamp(-1e100, 1e100).to(dtype).to(device)  # their sum is finite
    return bits.view(dtype).to(device)


def by_torch(tensor: torch.Tensor) -> Fingerprint:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernel_on", lambda device: None)
        return fingerprint(tensor)


def assert_same(tensor: torch.Tensor) -> None:
    assert kernel.takes(tensor)
    found, expected = fingerprint(tensor), by_torch(tensor)
    assert found == expected
    size = tensor.double().abs().sum().item()
    assert found.projection == pytest.approx(expected.projection, abs=1e-12 * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_the_kernel_finds_what_torch_finds(device, dtype, numel):
    assert_same(sample(dtype, numel, device))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float64], ids=str)
def test_a_tensor_may_begin_anywhere_and_have_any_strides(device, dtype):
    assert_same(sample(dtype, 5001, device)[1:])
    assert_same(sample(dtype, 5000, device).view(50, 100).t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64], ids=str)
def test_programs_take_turns(device, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "_PROGRAMS", 3)
    for rows in (3, 4, 20):
        assert_same(sample(dtype, rows * 1024, device))
        assert_same(sample(dtype, rows * 1024 + 5, device))


def test_cells_are_fresh_and_read_as_they_were_when_taken(device):
    tensors = {f"{numel}": sample(torch.bfloat16, numel, device) for numel in range(2 * module._CELLS + 1)}
    expected = {name: by_torch(tensor) for name, tensor in tensors.items()}
    prints = Fingerprints()
    for name, tensor in tensors.items():
        prints.add(name, tensor)
        tensor.zero_()
    assert prints.read() == expected


def test_not_a_number_and_infinity_keep_their_bits(device):
    tensor = torch.tensor([torch.nan, torch.inf, -0.0], device=device)
    assert fingerprint(tensor) == by_torch(tensor)


def test_a_dtype_that_the_kernel_does_not_know_is_taken_by_torch(device):
    tensor = torch.ones(5, dtype=torch.float8_e5m2fnuz, device=device)
    assert not kernel.takes(tensor)
    assert fingerprint(tensor).numel == 5


@pytest.mark.gpu
def test_a_gpu_takes_the_kernel_by_itself():
    assert module.kernel_on(torch.ones(1).cuda().device) is kernel


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    tensor = torch.zeros(2**31 + 5, dtype=torch.int8, device="cuda")
    tensor[:3], tensor[-3:] = 3, -7
    assert fingerprint(tensor) == by_torch(tensor)
    assert fingerprint(tensor) != fingerprint(tensor.roll(1))


@pytest.mark.gpu
def test_sizes_share_a_compilation(monkeypatch):
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **new: compiled.append(new["repr"]))
    for numel in (1, 2, 16, 1000, 1024, 2**20, 2**20 + 1):
        for dtype in (torch.float16, torch.float32):
            fingerprint(torch.ones(numel, dtype=dtype, device="cuda"))
    assert len(compiled) <= 2
