"""References to images and audio: what they may be, and what is said of those that cannot be read."""

from __future__ import annotations

import base64
import io
import math
import sys
import wave
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


FRAMES = encoded(PLAIN, "GIF", save_all=True, append_images=[Image.new("RGB", (5, 3))])
NOISE = encoded(Image.frombytes("RGB", (64, 64), bytes(range(256)) * 48))
UNREADABLE: dict[str, tuple[Any, str]] = {
    "no image": (b"hello", "UnidentifiedImageError"),
    "nothing": (b"", "UnidentifiedImageError"),
    "truncated": (NOISE[: len(NOISE) // 2], "truncated"),
    "broken": (NOISE[:60] + b"\0" * 40 + NOISE[100:], "Error"),
    "frames": (FRAMES, "2 frames"),
    "16 bits": (encoded(Image.new("I;16", (2, 2))), "I;16"),
    "floats": (Image.new("F", (2, 2)), "deeper than 8 bits"),
    "no file": ("/nowhere/x.png", "No such file"),
    "a folder": ("/tmp", "IsADirectoryError"),
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
    with pytest.raises(MediaError, match=says):
        image(reference)


@pytest.mark.parametrize("factor", [0.7, 0.4])  # Pillow warns of the one, and refuses the other
def test_a_decompression_bomb_is_refused_before_it_is_decoded(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(64 * 64 * factor))
    with pytest.raises(MediaError, match="DecompressionBomb"):
        image(NOISE)


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


@pytest.mark.parametrize(("rate", "wanted"), [(96000, 16000), (44100, 16000), (22050, 16000), (8000, 16000)])
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


UNHEARD: dict[str, tuple[Any, str]] = {
    "empty": (wav(torch.zeros(0, 1), 2), "not empty"),
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
