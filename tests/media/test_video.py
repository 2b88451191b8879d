"""Videos: frames and their rate from any container, and a MediaError for what is none."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_worlds import gif, wav
from PIL import Image

from lightrft.media import MediaError, MediaProcessor, video
from lightrft.media.video import video as read_video
from lightrft.samples import Media, Prompt

PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"
CONCATENATION = b"ffconcat version 1.0\nfile /etc/hostname\n"


def film(
    container: str = "mp4", frames: int = 6, rate: Fraction = Fraction(3), side: int = 64, light: str = ""
) -> bytes:
    """Grey, each frame lighter than the one before; or black, and white on its right."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as opened:
        stream = opened.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for number in range(frames):
            shade = numpy.full((side, side, 3), 0 if light else 6 * number % 256, dtype=numpy.uint8)
            if light:
                shade[:, side // 2 :] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")):
                opened.mux(packet)
        for packet in stream.encode():
            opened.mux(packet)
    return file.getvalue()


FILM = film()


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_films_frames_come_in_order_at_its_rate(container: str) -> None:
    frames, rate = read_video(film(container, 5, Fraction(5, 2)))
    assert (frames.shape, frames.dtype, rate) == ((5, 3, 64, 64), torch.uint8, 2.5)
    shades = frames.float().mean((1, 2, 3))
    assert torch.allclose(shades, 6 * torch.arange(5.0), atol=4)


def test_a_film_that_a_phone_took_upright_is_upright() -> None:
    """The matrix in its header turns what is on its right to the bottom."""
    file = bytearray(film(frames=2, light="right"))
    at = file.index(b"tkhd") + 44
    file[at : at + 36] = b"".join(
        number.to_bytes(4, "big", signed=True) for number in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    )
    frames, _ = read_video(bytes(file))
    rows = frames[0].float().mean((0, 2))
    assert rows[:24].max() < 20 and rows[-24:].min() > 235


def growing() -> bytes:
    """A GIF whose second frame lies beyond its first."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40), "red")])
    whole = bytearray(file.getvalue())
    at = whole.rindex(b",\0\0\0\0")  # where the second begins, and that it does so at the corner
    whole[at + 1] = 200
    return bytes(whole)


def test_frames_of_unlike_sizes_or_too_deep_are_refused() -> None:
    with pytest.raises(MediaError, match="must be alike"):
        read_video(growing())
    deep = io.BytesIO()
    Image.new("I;16", (8, 8), 60000).save(deep, "PNG")
    with pytest.raises(MediaError, match="8 bits"):
        read_video(deep.getvalue())
    for rate in (0, -1.0, float("nan")):
        with pytest.raises(MediaError, match="no rate"):
            read_video((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), rate))


def test_a_film_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    moved = tmp_path / "index first.mp4"
    options = {"movflags": "faststart"}
    with av.open(io.BytesIO(film(frames=40))) as given, av.open(str(moved), "w", options=options) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    whole = moved.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat") and len(read_video(whole)[0]) == 40
    with pytest.raises(MediaError, match=r"of its 40 frames are there|damaged|Invalid"):
        read_video(whole[: len(whole) - len(whole) // 3])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animations_frames_are_on_white_at_the_rate_they_are_shown(kind: str, tmp_path: Any) -> None:
    shades = [Image.new("RGBA", (20, 10), (0, 0, 0, 255 if at else 0)) for at in range(3)]
    path = tmp_path / "moves"
    shades[0].save(path, kind, save_all=True, append_images=shades[1:], duration=[200, 200, 600], lossless=True)
    frames, rate = read_video(str(path))
    assert frames.shape[1:] == (3, 10, 20) and rate == pytest.approx(len(frames))
    assert frames[0].float().mean() == 255 and frames[-1].float().mean() == 0


def test_frames_in_memory_are_taken_as_they_are() -> None:
    given = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    frames, rate = read_video((given, 4))
    assert torch.equal(frames, given) and rate == 4.0
    for wrong in (given.float(), given[0], given[:0], given.permute(0, 2, 3, 1)):
        with pytest.raises(MediaError, match=r"they must be uint8 \[T, 3, H, W\]"):
            read_video((wrong, 4))


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (b"", "empty"),
        (PLAYLIST, "Invalid|invalid|not permitted|whitelist"),
        (CONCATENATION, "Invalid|invalid|not permitted|whitelist"),
        (wav(0), "Invalid|whitelist|no video"),
        (FILM[:200], "Invalid|end of file|moov"),
        ("https://example.com/film.mp4", "URLs are not fetched"),
        (b"\0" * 64, "Invalid"),
    ],
    ids=["empty", "playlist", "concatenation", "sound", "cut short", "url", "zeros"],
)
def test_what_is_no_video_is_refused(reference: Any, says: str) -> None:
    with pytest.raises(MediaError, match=says):
        read_video(reference)


def test_more_frames_than_there_is_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_LARGEST", 4 * 64 * 64 * 3)
    for reference in (FILM, gif(1)):
        with pytest.raises(MediaError, match=r"too many to decode.*cut it"):
            read_video(reference)


def test_what_pyav_would_read_names_the_extra_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"lightning-rft\[video\]"):
        read_video(FILM)
    assert len(read_video(gif(0))[0]) == 4


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from([FILM, gif(0)]), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_a_harmed_file_is_read_or_refused(whole: bytes, changes: list[tuple[float, int]]) -> None:
    harmed = bytearray(whole)
    for place, byte in changes[:8]:
        harmed[int(place * len(whole))] = byte
    try:
        frames, rate = read_video(bytes(harmed))
    except MediaError:
        return
    assert frames.shape[1] == 3 and len(frames) > 0 and rate > 0


def test_images_after_a_video_are_refused_where_both_have_one_feature(internvl: MediaProcessor) -> None:
    ids = internvl._ids
    pieces = torch.tensor([20, ids["videos"], 21, ids["images"], 22])
    media = Media(images=(Image.new("RGB", (56, 56)),), videos=(gif(0),))
    with pytest.raises(MediaError, match="images before videos"):
        internvl.read(Prompt("odd", pieces, "", media=media))
    assert len(internvl.read(Prompt("even", pieces.flip(0), "", media=media)).items) == 2


@pytest.fixture
def internvl() -> MediaProcessor:
    from media_worlds import media_world

    return MediaProcessor(media_world("internvl").processor)
