"""The smallest media: where a model must see or hear something, whatever it is."""

from __future__ import annotations

import io
import math
import struct
import wave

_SIDE = 56  # pixels: what the vision towers in use take without enlarging it much
_RATE, _SAMPLES = 16000, 3200


def square() -> bytes:
    """A PNG file: half of it red, half of it blue."""
    from PIL import Image

    image = Image.new("RGB", (_SIDE, _SIDE), (255, 0, 0))
    image.paste((0, 0, 255), (_SIDE // 2, 0, _SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


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
