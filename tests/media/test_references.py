"""References to images and audio: what they may be, and what is said of those that cannot be read."""

from __future__ import annotations

import base64
import io
import math
import os
import struct
import sys
import wave
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightrft.media.references import MediaError, audio, described, image

RED = (200, 30, 60)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def wav(samples: Tensor, width: int, rate: int = 8000) -> bytes:
    """Of float ``[N, channels]`` in [-1, 1): little-endian integers, those of one byte without sign."""
    whole = (samples.double() * 2 ** (8 * width - 1)).round().long() + (128 if width == 1 else 0)
    raw = b"".join(int(one).to_bytes(width, "little", signed=width > 1) for one in whole.flatten())
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(samples.shape[1])
        opened.setsampwidth(width)
        opened.setframerate(rate)
        opened.writeframes(raw)
    return file.getvalue()


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """RGB of ``depth`` bits a channel, whether or not ``rows`` are as many as it says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


PLAIN = Image.new("RGB", (5, 3), RED)
PNG = encoded(PLAIN)


def test_an_image_is_the_same_from_every_kind_of_reference(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    references = [
        PNG,
        bytearray(PNG),
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "data:image/png," + quote(PNG),
        PLAIN,
    ]
    for reference in references:
        found = image(reference)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", (5, 3), PLAIN.tobytes())


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_mode_of_8_bits_becomes_rgb(mode: str) -> None:
    picture = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    found = image(encoded(picture, "JPEG") if mode in ("CMYK", "YCbCr") else encoded(picture))
    assert found.mode == "RGB"
    assert min(found.getpixel((1, 1))) > 250


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (2, 1), (*RED, 0))
    clear.putpixel((1, 0), (*RED, 255))
    assert [image(encoded(clear)).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]
    paletted = Image.new("P", (2, 1))
    paletted.putpalette([*RED, 1, 2, 3])
    paletted.putpixel((1, 0), 1)
    found = image(encoded(paletted, transparency=1))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]


def test_of_a_phones_several_pictures_the_first_is_the_photograph() -> None:
    file = encoded(PLAIN, "MPO", save_all=True, append_images=[Image.new("RGB", (2, 2))])
    assert Image.open(io.BytesIO(file)).n_frames == 2
    assert image(file).size == (5, 3)


def test_a_camera_held_sideways_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image(encoded(PLAIN, "JPEG", exif=exif)).size == (3, 5)


def test_channels_of_16_bits_keep_their_upper_8() -> None:
    rows = b"\0" + struct.pack(">6H", 0xFFFF, 0x80FF, 0x0100, 0, 0x1234, 0x00FF)
    found = image(png(2, 1, 16, rows))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(0xFF, 0x80, 0x01), (0, 0x12, 0)]


def test_what_a_file_is_called_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(PLAIN, "BMP"))
    (tmp_path / "clip.mp3").write_bytes(wav(torch.full((4, 1), 0.5), 2))
    assert image(tmp_path / "photo.png").tobytes() == PLAIN.tobytes()
    assert audio(tmp_path / "clip.mp3", 8000).tolist() == [0.5] * 4
    (tmp_path / "text.jpg").write_text("I am a photo.")
    with pytest.raises(MediaError, match="no image of a kind that is read: PNG, JPEG, "):
        image(tmp_path / "text.jpg")


MOVING = {"save_all": True, "append_images": [Image.new("RGB", (5, 3))]}
NOISE = encoded(Image.frombytes("RGB", (64, 64), bytes(range(256)) * 48))
UNREADABLE: dict[str, tuple[Any, str]] = {
    "no image": (b"hello", "no image of a kind that is read"),
    "nothing": (b"", "empty"),
    "nothing in a URI": ("data:image/png;base64,", "empty"),
    "a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "no image of a kind that is read",
    ),
    "no pixels": (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
    "no pixels in a file": (png(0, 5, 8, b""), "no image of a kind that is read"),
    "a line": (png(1, 10**7, 8, b""), "1 x 10000000 pixels, an aspect ratio above 200"),
    "a bomb": (png(40_000, 40_000, 8, b""), "decompression ?bomb"),
    "truncated": (NOISE[: len(NOISE) // 2], "truncated"),
    "broken": (NOISE[:60] + b"\0" * 40 + NOISE[100:], "Error"),
    "a GIF that moves": (encoded(PLAIN, "GIF", **MOVING), "2 frames"),
    "a PNG that moves": (encoded(PLAIN, "PNG", **MOVING), "2 frames"),
    "a WebP that moves": (encoded(PLAIN, "WEBP", **MOVING), "2 frames"),
    "pages": (encoded(PLAIN, "TIFF", **MOVING), "2 frames"),
    "16 bits": (encoded(Image.new("I;16", (2, 2))), "I;16"),
    "floats": (Image.new("F", (2, 2)), "deeper than 8 bits"),
    "no file": ("/nowhere/x.png", "No such file"),
    "a folder": ("/tmp", "a folder, a pipe or a device"),
    "no end": ("/dev/zero", "a folder, a pipe or a device"),
    "a null byte": ("x\0y", "null byte"),
    "a URL": ("https://example.com/x.png", "not fetched"),
    "a file's URL": ("file:///tmp/x.png", "not fetched"),
    "no comma": ("data:image/png;base64", "no comma"),
    "no base64": ("data:image/png;base64,!!!!", "not base64"),
    "a list": ([1, 2], "a list is no reference"),
    "None": (None, "a NoneType is no reference"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_image_that_cannot_be_read_says_why(case: str) -> None:
    reference, says = UNREADABLE[case]
    with pytest.raises(MediaError, match=f"(?i){says}"):
        image(reference)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("factor", [0.7, 0.4])  # Pillow warns of the one, and refuses the other
def test_a_decompression_bomb_is_refused_before_it_is_decoded(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(64 * 64 * factor))
    with pytest.raises(MediaError, match=r"(?i)decompression ?bomb"):
        image(NOISE)


@pytest.mark.timeout(30)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    for read in (image, lambda reference: audio(reference, 8000)):
        with pytest.raises(MediaError, match="a folder, a pipe or a device"):
            read(tmp_path / "x.png")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.wav").open("wb") as file:
        file.truncate(2**40)  # no block of it is written
    with pytest.raises(MediaError, match=f"it has {2**40} bytes; {2**28} are read at most"):
        audio(tmp_path / "x.wav", 8000)


@pytest.mark.parametrize("kind", ["bytes", "data URI"])
def test_as_many_bytes_are_read_from_memory_as_from_a_file(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = PNG if kind == "bytes" else "data:image/png;base64," + base64.b64encode(PNG).decode()
    monkeypatch.setattr("lightrft.media.references._LARGEST", len(PNG))
    assert image(reference).size == (5, 3)
    monkeypatch.setattr("lightrft.media.references._LARGEST", len(PNG) - 1)
    with pytest.raises(MediaError, match=f"it has {len(PNG)} bytes; {len(PNG) - 1} are read at most"):
        image(reference)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width_is_its_samples(width: int) -> None:
    samples = torch.tensor([0.0, 0.5, -0.5, -1.0, 0.99, 0.25])[:, None]
    found = audio(wav(samples, width), 8000)
    assert (found.dtype, found.shape) == (torch.float32, (6,))
    assert torch.allclose(found, samples[:, 0], atol=2.0 ** (1 - 8 * width) + 1e-7)


def test_channels_are_averaged() -> None:
    stereo = torch.tensor([[0.5, 0.25], [-0.5, 0.5], [0.0, -1.0]])
    assert audio(wav(stereo, 2), 8000).tolist() == [0.375, 0.0, -0.5]


def test_audio_is_the_same_from_every_kind_of_reference(tmp_path: Path) -> None:
    file = wav(torch.linspace(-1, 0.9, 50)[:, None], 2)
    (tmp_path / "x.wav").write_bytes(file)
    expected = audio(file, 8000)
    uri = "data:audio/wav;base64," + base64.b64encode(file).decode()
    for reference in (tmp_path / "x.wav", uri, (expected, 8000), (expected.numpy(), 8000), (expected.tolist(), 8000)):
        assert torch.equal(audio(reference, 8000), expected)


@pytest.mark.parametrize(
    ("rate", "wanted"), [(96000, 16000), (44100, 16000), (44101, 16000), (22050, 16000), (8000, 16000)]
)
def test_a_tone_is_the_same_tone_at_another_rate(rate: int, wanted: int) -> None:
    def tone(rate: int, length: int, hertz: float = 1000.0) -> Tensor:
        return torch.sin(2 * math.pi * hertz * torch.arange(length, dtype=torch.float64) / rate).float()

    found = audio((tone(rate, rate // 4), rate), wanted)
    assert len(found) == math.ceil(rate // 4 * wanted / rate)
    inner = slice(100, -100)
    assert (found - tone(wanted, len(found)))[inner].abs().max() < 1e-4
    if rate > 2 * wanted:  # what the lower rate cannot hold is gone rather than folded
        assert audio((tone(rate, rate // 4, 0.8 * wanted), rate), wanted)[inner].abs().max() < 1e-3


def test_the_same_rate_changes_nothing_and_a_short_clip_keeps_its_length() -> None:
    assert audio(([0.1, 0.2], 16000), 16000).tolist() == torch.tensor([0.1, 0.2]).tolist()
    assert len(audio(([0.1], 96000), 16000)) == 1


def claiming(size: int) -> bytes:
    """A WAV file whose header says that so many bytes of samples follow."""
    file = wav(torch.full((100, 1), 0.5), 2)
    return file[:40] + struct.pack("<I", size) + file[44:]


def header(**changes: int) -> bytes:
    """A WAV file with other numbers in its format."""
    numbers = {"format": 1, "channels": 1, "rate": 8000, "bytes": 16000, "align": 2, "bits": 16} | changes
    return wav(torch.zeros(4, 1), 2)[:20] + struct.pack("<HHIIHH", *numbers.values()) + wav(torch.zeros(4, 1), 2)[36:]


UNHEARD: dict[str, tuple[Any, str]] = {
    "empty": (wav(torch.zeros(0, 1), 2), "not empty"),
    "nothing": (b"", "it is empty"),
    "cut in its header": (wav(torch.zeros(4, 1), 2)[:30], "broken WAV file"),
    "four gigabytes, it says": (claiming(2**32 - 1), "ends after 100 of its 2147483647 samples"),
    "no channels": (header(channels=0), "broken WAV file"),
    "no bits": (header(bits=0), "broken WAV file"),
    "64 bits": (header(bits=64, align=8), "RuntimeError|ends after"),
    "a rate of 1": (header(rate=1), "rate is 1; it must be 1000 to 768000"),
    "a rate of 2**31": (header(rate=2**31), "rate is 2147483648"),
    "no rate": ((torch.ones(3), 0), "rate is 0"),
    "two dimensions": ((torch.ones(3, 2), 8000), "one channel"),
    "not finite": ((torch.tensor([0.0, math.nan]), 8000), "not finite"),
    "no rate given": (torch.ones(3), "a Tensor is no reference"),
    "three": ((1, 2, 3), "too many values"),
    "no file": ("/nowhere/x.wav", "No such file"),
    "cut short": (wav(torch.full((100, 1), 0.5), 2)[: 44 + 2 * 30 + 1], "ends after 30 of its 100 samples"),
}


@pytest.mark.parametrize("case", UNHEARD)
def test_audio_that_cannot_be_read_says_why(case: str) -> None:
    reference, says = UNHEARD[case]
    with pytest.raises(MediaError, match=says):
        audio(reference, 16000)


def test_what_is_longer_than_the_model_hears_is_refused_not_cut() -> None:
    assert len(audio((torch.zeros(8000), 8000), 16000, most=16000)) == 16000
    with pytest.raises(MediaError, match=r"lasts 1\.00 s, but 0\.5 s are heard at most; shorten it"):
        audio((torch.zeros(8000), 8000), 16000, most=8000)


def test_samples_that_are_no_numbers_are_refused_in_a_file_too(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "x.wav", [0.25, -0.5], 8000, subtype="FLOAT")
    assert audio(tmp_path / "x.wav", 8000).tolist() == [0.25, -0.5]
    soundfile.write(tmp_path / "x.wav", [0.25, math.nan], 8000, subtype="FLOAT")
    with pytest.raises(MediaError, match="not finite"):
        audio(tmp_path / "x.wav", 8000)


def test_other_formats_ask_for_the_package_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"soundfile.*lightning-rft\[audio\]"):
        audio(b"fLaC....", 16000)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (b"abc", "3 bytes"),
        (Path("/a/b.png"), "'/a/b.png'"),
        ("data:,xy", "a data URI of 8 characters"),
        (PLAIN, "Image"),
    ],
)
def test_a_reference_is_described_without_its_data(reference: Any, says: str) -> None:
    assert says in described(reference)
