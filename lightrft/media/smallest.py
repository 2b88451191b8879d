"""The smallest media: where a model must see or hear something, whatever it is."""

from __future__ import annotations

import io
import math
import struct
import wave
from typing import Any

_SIDE = 56  # pixels: what the vision towers in use take without enlarging it much
_RATE, _SAMPLES = 16000, 3200


def square() -> bytes:
    """A PNG file: half of it red, half of it blue."""
    file = io.BytesIO()
    _halves((0, 0, 255)).save(file, "PNG")
    return file.getvalue()


def blinking(frames: int) -> bytes:
    """A GIF file, each frame of which is shown for half a second."""
    first, *others = [_halves((0, 255 * (number % 2), 10 * number % 256)) for number in range(frames)]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=500)
    return file.getvalue()


def _halves(right: tuple[int, int, int]) -> Any:
    """Red on its left."""
    from PIL import Image

    image = Image.new("RGB", (_SIDE, _SIDE), (255, 0, 0))
    image.paste(right, (_SIDE // 2, 0, _SIDE, _SIDE))
    return image


def beep() -> bytes:
    """A WAV file: 0.2 seconds of 440 Hz."""
    tone = (round(16000 * math.sin(2 * math.pi * 440 * step / _RATE)) for step in range(_SAMPLES))
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(_RATE)
        opened.writeframes(struct.pack(f"<{_SAMPLES}h", *tone))
    return file.getvalue()
