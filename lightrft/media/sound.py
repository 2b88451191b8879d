"""Waveforms: out of WAV files, and from one sampling rate to another."""

from __future__ import annotations

import io
import math
import wave

import torch
from torch import Tensor
from torch.nn.functional import pad

_ZERO_CROSSINGS = 16  # of the windowed sinc, on either side
_AT_ONCE = 2**16  # new samples: what each is made of takes hundreds of times its memory
_ROLLOFF = 0.95  # of the lower Nyquist frequency; the window needs the rest to fall off


def from_wav(file: io.BytesIO) -> tuple[Tensor, int] | None:
    """Samples, float32 ``[N]`` in [-1, 1), channels averaged, and rate of a WAV file of 8, 16, 24 or 32-bit integers.

    ``None`` when it is something else.

    Raises:
        ValueError: the file is broken, or ends before its samples do.
    """
    try:
        with wave.open(file) as opened:
            width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            count = opened.getnframes()
            frames = bytearray(opened.readframes(count))
    except (wave.Error, EOFError) as error:
        if file.getvalue()[:4] != b"RIFF" or str(error).startswith("unknown"):  # format: floats, say
            return None
        raise ValueError(f"a broken WAV file ({error or 'it ends in its header'})") from error
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
    cutoff = _ROLLOFF * min(1.0, wanted / rate)  # in half periods for each old sample
    reach = math.ceil(_ZERO_CROSSINGS / cutoff)
    taps = torch.arange(-reach, reach + 2, dtype=torch.float64)  # where they lie, seen from the old sample before
    count = math.ceil(len(samples) * new / old)
    windows = pad(samples, (reach, reach + old + 1)).unfold(0, len(taps), 1)
    found = samples.new_empty(count)
    for phase in range(min(new, count)):
        before, rest = divmod(phase * old, new)
        at = (taps - rest / new) * cutoff
        window = torch.cos(at.clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS) * math.pi / (2 * _ZERO_CROSSINGS)).square()
        taken = (torch.sinc(at) * window * cutoff).to(samples.dtype)
        heard = windows[before::old][: len(range(phase, count, new))]
        found[phase::new] = torch.cat([part @ taken for part in heard.split(_AT_ONCE)])
    return found


def _whole_numbers(raw: Tensor, width: int) -> Tensor:
    """Little-endian integers of ``width`` bytes, to float32 in [-1, 1). Those of one byte have no sign."""
    if width == 1:
        return (raw.float() - 128) / 128
    # Into the upper bytes of 32 bits, so that the sign is theirs.
    whole = torch.zeros(len(raw) // width, 4, dtype=torch.uint8)
    whole[:, 4 - width :] = raw.view(-1, width)
    return whole.view(torch.int32)[:, 0].float() / 2**31
