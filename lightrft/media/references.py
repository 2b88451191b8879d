"""What a reference to an image or to audio holds; nothing is ever fetched over a network."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
from typing import Any
from urllib.parse import unquote_to_bytes

import torch
from torch import Tensor

from lightrft.media.sound import from_wav, resampled

_DATA_URI = re.compile(r"data:[^,]*?(?P<base64>;base64)?,(?P<data>.*)", re.DOTALL)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# Of one channel, and the colours of others: what an 8-bit RGB image can hold. Deeper ones would be clipped.
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
# Not all that Pillow opens: for some it starts other programs.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
_LONGEST_SIDE = 200  # shorter sides: processors that resize by the shorter one would fill the memory
_LARGEST = 2**28  # bytes of a file, and samples of a sound: more than four hours at 16 kHz
_RATES = range(1000, 768_001)  # samples a second


class MediaError(ValueError):
    """An image or audio that cannot be used. The message names the prompt, the item and why."""


def image(reference: Any) -> Any:
    """The RGB image that a reference stands for, turned upright, on white where it is transparent.

    Args:
        reference: a path, the bytes of a file, a data URI, or a ``PIL`` image.

    Raises:
        MediaError: it cannot be read, holds more than 8 bits a channel or several frames, or is too large, too long and
            thin, or without pixels.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(f"Images need Pillow ({error}); pip install 'lightning-rft[vision]'.") from error
    try:
        given = isinstance(reference, Image.Image)
        opened: Any = reference if given else Image.open(file_of(reference), formats=_FORMATS)
        width, height = opened.size
        check_size(width, height, Image.MAX_IMAGE_PIXELS)
        # Phones write previews and depth maps behind a photograph, as MPO.
        if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
            raise MediaError(f"it has {opened.n_frames} frames; give the one that is meant")
        check_depth(opened)
        opened.load()
        return on_white(ImageOps.exif_transpose(opened))
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"it is no image of a kind that is read: {', '.join(_FORMATS)}") from error
    # Decoders raise what they like on broken files: SyntaxError, struct.error, a bomb's own.
    except Exception as error:
        raise MediaError(f"{type(error).__name__}: {error}") from error


def on_white(image: Any) -> Any:
    """A ``PIL`` image in RGB, on white where it is transparent."""
    from PIL import Image

    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def audio(reference: Any, rate: int, most: int = _LARGEST) -> Tensor:
    """The sound that a reference stands for: float32 ``[N]`` at ``rate`` samples a second, its channels averaged.

    Args:
        reference: a path, the bytes of a file, a data URI, or samples ``[N]`` with their rate, ``(samples, rate)``.
            WAV files with whole numbers are read by the standard library, all others by ``soundfile``.
        rate: what the model hears.
        most: the largest ``N`` that it hears.

    Raises:
        MediaError: it cannot be read, is empty, not finite, longer than the model hears, or of a rate that is none.
        ImportError: ``soundfile`` is needed and not installed.
    """
    try:
        samples, own_rate = _samples(reference)
    except (MediaError, ImportError):
        raise
    except Exception as error:
        raise MediaError(f"{type(error).__name__}: {error}") from error
    if samples.ndim != 1 or len(samples) == 0:
        raise MediaError(f"its samples have shape {list(samples.shape)}; they must be one channel, not empty")
    if not bool(samples.isfinite().all()):
        raise MediaError("it has samples that are not finite")
    if own_rate not in _RATES:
        raise MediaError(f"its rate is {own_rate}; it must be {_RATES[0]} to {_RATES[-1]} samples a second")
    if len(samples) * rate > most * own_rate:
        raise MediaError(
            f"it lasts {len(samples) / own_rate:.2f} s, but {most / rate:g} s are heard at most; shorten it"
        )
    return resampled(samples, own_rate, rate)


def described(reference: Any) -> str:
    """A reference in a few words, for messages."""
    if isinstance(reference, (bytes, bytearray)):
        return f"{len(reference)} bytes"
    text = os.fspath(reference) if isinstance(reference, os.PathLike) else reference
    if not isinstance(text, str):
        return f"a {type(reference).__name__}"
    return f"a data URI of {len(text)} characters" if text.startswith("data:") else repr(text[:200])


def _samples(reference: Any) -> tuple[Tensor, int]:
    if isinstance(reference, tuple):
        samples, rate = reference
        return torch.as_tensor(samples).detach().cpu().to(torch.float32), int(rate)
    file = file_of(reference)
    found = from_wav(file)
    if found is not None:
        return found
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            f"Audio other than WAV with whole numbers needs soundfile ({error}); pip install 'lightning-rft[audio]'."
        ) from error
    file.seek(0)
    with soundfile.SoundFile(file) as opened:
        if opened.frames * opened.channels > _LARGEST:
            raise MediaError(f"it has {opened.frames} samples in {opened.channels} channels, too many to decode")
        return torch.from_numpy(opened.read(dtype="float32", always_2d=True)).mean(1), int(opened.samplerate)


def check_depth(image: Any) -> None:
    """Refuse a ``PIL`` image that RGB would clip.

    Raises:
        MediaError: it is one.
    """
    if image.mode not in _MODES:
        raise MediaError(f"its mode is {image.mode}, deeper than 8 bits a channel; convert it to RGB")


def check_size(width: int, height: int, most: int | None) -> None:
    """Refuse an image without pixels, of more than ``most``, or too long and thin.

    Raises:
        MediaError: it is.
    """
    if width * height == 0:
        raise MediaError(f"it has {width} x {height} pixels, none at all")
    if most is not None and width * height > most:
        raise MediaError(f"it has {width} x {height} pixels, a decompression bomb; Pillow's limit is {most}")
    if max(width, height) > _LONGEST_SIDE * min(width, height):
        raise MediaError(f"it has {width} x {height} pixels, an aspect ratio above {_LONGEST_SIDE}")


def file_of(reference: Any) -> io.BytesIO:
    """All bytes of a reference.

    Raises:
        MediaError: there are none, or too many, or it is none.
    """
    data = _bytes(reference)
    if not data:
        raise MediaError("it is empty, without a byte")
    _check_bytes(len(data))
    return io.BytesIO(data)


def _bytes(reference: Any) -> bytes | bytearray:
    if isinstance(reference, (bytes, bytearray)):
        return reference
    if not isinstance(reference, (str, os.PathLike)):
        raise MediaError(f"a {type(reference).__name__} is no reference; give a path, bytes or a data URI")
    name = os.fspath(reference)
    if isinstance(name, str) and name.startswith("data:"):
        return _inside(name)
    if isinstance(name, str) and _URL.match(name):
        raise MediaError("URLs are not fetched; download the file and give its path")
    found = os.stat(name)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for who writes, and a device has no end
        raise MediaError("it is a folder, a pipe or a device; give a file")
    _check_bytes(found.st_size)
    with open(name, "rb") as file:
        return file.read(found.st_size)


def _check_bytes(count: int) -> None:
    if count > _LARGEST:
        raise MediaError(f"it has {count} bytes; {_LARGEST} are read at most")


def _inside(uri: str) -> bytes:
    found = _DATA_URI.fullmatch(uri)
    if found is None:
        raise MediaError("the data URI has no comma before its data")
    data = unquote_to_bytes(found["data"])
    if not found["base64"]:
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise MediaError(f"the data URI is not base64: {error}") from error
