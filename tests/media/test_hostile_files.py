"""Any bytes at all are an image, a sound or a MediaError; what the model would not see or hear in full is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_worlds import media_world, wav
from PIL import Image
from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

from lightrft.media import MediaError, MediaProcessor
from lightrft.media.references import audio, image
from lightrft.samples import Media, Prompt

RATE = 16000
# Without soundfile nobody can tell whether a file that is no WAV is a sound.
UNHEARD = (MediaError,) if find_spec("soundfile") else (MediaError, ImportError)


def picture(kind: str) -> bytes:
    drawn = Image.frombytes("RGB", (24, 16), bytes(range(256)) * 4 + bytes(128))
    file = io.BytesIO()
    drawn.save(file, kind)
    return file.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")}
SOUNDS = {"mono": wav(0, 0.02), "stereo": wav(1, 0.02, rate=44100, channels=2)}
WHOLE = {**PICTURES, **SOUNDS}

edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)
fuzzed = settings(derandomize=True, deadline=None, max_examples=150)


def harmed(file: bytes, changes: list[tuple[float, int]], kept: float) -> bytes:
    """Bytes at relative places changed, most of them in the header, and the end cut off."""
    harmed = bytearray(file)
    for place, byte in changes:
        harmed[int(place * place * len(file))] = byte
    return bytes(harmed[: round(kept * len(file))])


def check_image(file: bytes) -> None:
    try:
        found = image(file)
    except MediaError:
        return
    assert found.mode == "RGB" and min(found.size) > 0


def check_audio(file: bytes) -> None:
    try:
        found = audio(file, RATE, most=30 * RATE)
    except UNHEARD:
        return
    assert (found.dtype, found.ndim) == (torch.float32, 1) and found.isfinite().all() and 0 < len(found) <= 30 * RATE


@fuzzed
@given(st.sampled_from(sorted(WHOLE)), edits, st.sampled_from([1.0, 1.0, 0.99, 0.6, 0.1]))
def test_a_harmed_file_is_read_or_refused(kind: str, changes: list[tuple[float, int]], kept: float) -> None:
    (check_image if kind in PICTURES else check_audio)(harmed(WHOLE[kind], changes, kept))


@fuzzed
@given(st.sampled_from([b"", *(file[:16] for file in WHOLE.values())]), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(beginning: bytes, rest: bytes) -> None:
    check_image(beginning + rest)
    check_audio(beginning + rest)


def asked(family: str, reference: Any) -> Prompt:
    world = media_world(family)
    return Prompt("set/7", torch.tensor(world.around), "", media=Media(**{world.kind: (reference,)}))


READS: dict[str, Callable[[MediaProcessor, Prompt], Any]] = {
    "trainer": MediaProcessor.read,
    "engine that processes": MediaProcessor.decoded,
}


@pytest.mark.parametrize("who", READS)
def test_what_qwen2_audio_would_cut_is_refused(who: str) -> None:
    tokenizer = media_world("qwen2_audio").processor.tokenizer
    media = MediaProcessor(Qwen2AudioProcessor(WhisperFeatureExtractor(), tokenizer))  # 30 seconds, as published
    READS[who](media, asked("qwen2_audio", wav(0, 30)))
    says = r"'set/7': audio 0 \(\d+ bytes\) cannot be used: it lasts 60\.00 s, but 30 s are heard at most"
    with pytest.raises(MediaError, match=says):
        READS[who](media, asked("qwen2_audio", wav(0, 60)))


def test_96_khz_in_two_channels_are_as_many_tokens_as_16_khz_in_one() -> None:
    media = MediaProcessor(media_world("qwen2_audio").processor)
    files = wav(0, 0.4), wav(0, 0.4, rate=96000, channels=2)
    tokens = [media.read(asked("qwen2_audio", file)).token_ids for file in files]
    assert torch.equal(*tokens) and len(tokens[0]) > 5


@pytest.mark.parametrize(("family", "kinds"), [("llava", PICTURES), ("qwen2_audio", SOUNDS)])
@settings(fuzzed, max_examples=40)
@given(st.data())
def test_what_is_read_of_a_harmed_file_the_processor_takes_or_refuses_by_name(
    family: str, kinds: dict[str, bytes], data: st.DataObject
) -> None:
    file = harmed(kinds[data.draw(st.sampled_from(sorted(kinds)))], data.draw(edits), 1.0)
    try:
        reading = MediaProcessor(media_world(family).processor).read(asked(family, file))
    except UNHEARD as error:
        assert "'set/7'" in str(error)
        return
    assert len(reading.items) == 1
