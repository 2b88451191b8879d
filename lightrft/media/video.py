"""What a reference to a video holds: its frames, and how many of them are a second."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightrft.media import references
from lightrft.media.references import MediaError

# Of FFmpeg's: none that reads further files by what stands in one, as playlists do.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv"
_LARGEST = 2**30  # bytes of all frames, decoded
_MOST = 20_000  # frames
_WHOLE = 0.95  # of the frames that a file says it has
_SECONDS = 0.1  # of an animation's frame that does not say how long it is shown, as browsers show it


def video(reference: Any) -> tuple[Tensor, float]:
    """The frames that a reference stands for, uint8 ``[T, 3, H, W]``, and how many are shown a second.

    Args:
        reference: a path, the bytes of a file, a data URI, or ``(frames, rate)``. Animations (GIF, PNG, WebP) are read
            by Pillow, all others by PyAV.

    Raises:
        MediaError: it cannot be read, has no frames, or too many for the memory.
        ImportError: the library that is needed is not installed.
    """
    try:
        if isinstance(reference, tuple):
            frames, rate = reference
            if not 0 < rate < math.inf:
                raise MediaError(f"{rate} frames a second is no rate")
            return _checked(torch.as_tensor(frames).detach().cpu()), float(rate)
        file = references.file_of(reference)
        return _animation(file) or _film(file)
    except (MediaError, ImportError):
        raise
    except Exception as error:  # decoders raise what they like
        raise MediaError(f"{type(error).__name__}: {error}") from error


def metadata(frames: Tensor, rate: float) -> dict[str, Any]:
    """What processors want to know of frames ``[T, 3, H, W]`` that are all there."""
    count, height, width = len(frames), *frames.shape[2:]
    about = {"total_num_frames": count, "fps": rate, "duration": count / rate, "frames_indices": list(range(count))}
    return about | {"width": width, "height": height}


def _checked(frames: Tensor) -> Tensor:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise MediaError(f"its frames are {frames.dtype} {list(frames.shape)}; they must be uint8 [T, 3, H, W]")
    references.check_size(frames.shape[3], frames.shape[2], None)
    return frames


def _animation(file: io.BytesIO) -> tuple[Tensor, float] | None:
    """``None`` where it is no image."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        opened: Any = Image.open(file, formats=("GIF", "PNG", "WEBP"))
    except UnidentifiedImageError:
        return None
    width, height = opened.size
    references.check_size(width, height, Image.MAX_IMAGE_PIXELS)
    _check_room(getattr(opened, "n_frames", 1), width, height)
    frames, seconds = [], 0.0
    for number, frame in enumerate(ImageSequence.Iterator(opened)):
        if number == 0 and getattr(opened, "default_image", False):
            continue  # of who shows no animations
        if frame.size != (width, height):
            raise MediaError(
                f"frame {number} has {frame.size} pixels and the first {(width, height)}; they must be alike"
            )
        references.check_depth(frame)
        frames.append(_pixels(references.on_white(frame)))
        seconds += frame.info.get("duration", 0) / 1000 or _SECONDS  # known once it is decoded
    return torch.stack(frames), len(frames) / seconds


def _pixels(image: Any) -> Tensor:
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


def _film(file: io.BytesIO) -> tuple[Tensor, float]:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"Videos other than GIF, PNG and WebP need PyAV ({error}); pip install 'lightning-rft[video]'."
        ) from error
    file.seek(0)
    with av.open(file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"}) as container:
        if not container.streams.video:
            raise MediaError("it holds no video")
        stream = container.streams.video[0]
        said, rate = stream.frames, stream.average_rate or stream.guessed_rate
        frames = list(_decoded(container, stream))
    if not frames or len(frames) < _WHOLE * said:
        raise MediaError(f"{len(frames)} of its {said} frames are there" if said else "it has no frames")
    if not rate:
        raise MediaError("it does not say how many frames are shown a second")
    return torch.stack(frames), float(rate)


def _decoded(container: Any, stream: Any) -> Iterator[Tensor]:
    """Upright, all in the size of the first."""
    width, height = stream.width, stream.height
    references.check_size(width, height, None)
    _check_room(max(1, stream.frames), width, height)
    for number, frame in enumerate(container.decode(stream)):
        _check_room(number + 1, width, height)
        if frame.is_corrupt:
            raise MediaError(f"frame {number} is damaged")
        rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height)).permute(2, 0, 1)
        yield torch.rot90(rgb, round(frame.rotation / 90), (1, 2))


def _check_room(frames: int, width: int, height: int) -> None:
    if frames > _MOST or frames * width * height * 3 > _LARGEST:
        raise MediaError(
            f"it has {frames} frames of {width} x {height} pixels, or more: too many to decode ({_MOST}, and "
            f"{_LARGEST} bytes, at most); cut it, or make it smaller"
        )
