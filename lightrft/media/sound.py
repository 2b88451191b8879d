"""Waveforms: out of WAV files, and from one sampling rate to another."""

from __future__ import annotations

import io
import math
import wave

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

_ZERO_CROSSINGS = 16  # of the windowed sinc, on either side
_ROLLOFF = 0.95  # of the lower Nyquist frequency; the window needs the rest to fall off


def from_wav(file: io.BytesIO) -> tuple[Tensor, int] | None:
    """Samples, float32 ``[N]`` in [-1, 1), channels averaged, and rate of a WAV file of 8, 16, 24 or 32-bit integers.

    ``None`` when it is something else.

    Raises:
        ValueError: the file ends before its samples do.
    """
    try:
        with wave.open(file) as opened:
            width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            count = opened.getnframes()
            frames = bytearray(opened.readframes(count))
    except (wave.Error, EOFError):
        return None
    if len(frames) < count * width * channels:
        raise ValueError(f"the file ends after {len(frames) // (width * channels)} of its {count} samples")
    if count == 0:
        return torch.zeros(0), rate
    return _whole_numbers(torch.frombuffer(frames, dtype=torch.uint8), width).view(-1, channels).mean(1), rate


def resampled(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """float32 ``[ceil(N * wanted / rate)]``: band-limited interpolation of float32 ``[N]``.

    A sinc under a Hann window, one filter for each phase between the two rates
    (https://ccrma.stanford.edu/~jos/resample/).
    """
    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    old, new = rate // common, wanted // common
    cutoff = _ROLLOFF * min(old, new)  # in half periods for each `old` samples
    reach = math.ceil(_ZERO_CROSSINGS * old / cutoff)
    # Where the taps lie, seen from each new sample, in units of `old` samples.
    taps = torch.arange(-reach, reach + old, dtype=torch.float64)[None] / old
    at = (taps - torch.arange(new, dtype=torch.float64)[:, None] / new) * cutoff
    window = torch.cos(at.clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS) * math.pi / (2 * _ZERO_CROSSINGS)).square()
    filters = (torch.sinc(at) * window * cutoff / old).to(samples.dtype)
    phases = conv1d(pad(samples[None, None], (reach, reach + old)), filters[:, None], stride=old)
    return phases[0].t().reshape(-1)[: math.ceil(len(samples) * new / old)].contiguous()


def _whole_numbers(raw: Tensor, width: int) -> Tensor:
    """Little-endian integers of ``width`` bytes, to float32 in [-1, 1). Those of one byte have no sign."""
    if width == 1:
        return (raw.float() - 128) / 128
    # Into the upper bytes of 32 bits, so that the sign is theirs.
    whole = torch.zeros(len(raw) // width, 4, dtype=torch.uint8)
    whole[:, 4 - width :] = raw.view(-1, width)
    return whole.view(torch.int32)[:, 0].float() / 2**31
