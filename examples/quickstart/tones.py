"""The audio quickstart's world: beeps, and questions about how many there are and how high; everything made here."""

from __future__ import annotations

import math
import random
import struct
import wave
from pathlib import Path

import torch
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)
from world import CAREFULLY, Task, word_tokenizer, write_tasks

RATE = 16000  # samples a second
SECONDS = 1  # what the model hears of a clip; 30 in the models that are published
QUESTIONS = {
    "count": "<audio>how many beeps ?",
    "second": "<audio>is the second higher or lower ?",
}
COUNTS = ("one", "two", "three", "four")
SPECIAL = ["<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"]
WORDS = [*" ".join([*QUESTIONS.values(), CAREFULLY]).replace("<audio>", "").split(), *COUNTS]


def write(root: Path, seed: int, short: bool) -> str:
    """The untrained model with its processor, and :func:`world.write_tasks`."""
    torch.manual_seed(seed)
    write_model(root / "untrained")
    return f"{write_tasks(root, seed, short, make_task, write_clip)} about sounds"


def make_task(rng: random.Random) -> Task:
    """A question of one of two kinds; each kind has a mistake of its own."""
    kind = rng.choice(list(QUESTIONS))
    if kind == "count":
        number = rng.randint(1, 4)  # careless: overhears one of several
        answer, careless = COUNTS[number - 1], COUNTS[max(number - 2, 0)]
        return Task(QUESTIONS[kind], [pitch(rng) for _ in range(number)], answer, careless)
    first = rng.uniform(550, 650)
    answer = rng.choice(["higher", "lower"])  # careless: hears every second one as higher
    interval = rng.uniform(1.6, 2.2)
    return Task(
        QUESTIONS[kind], [first, first * interval if answer == "higher" else first / interval], answer, "higher"
    )


def pitch(rng: random.Random) -> float:
    return 600 * 3 ** rng.uniform(-0.5, 0.5)


def samples(pitches: list[float], rng: random.Random) -> list[int]:
    """16-bit samples; length and loudness of beeps and pauses are random."""
    clip: list[int] = []
    for hertz in pitches:
        clip += [0] * int(RATE * rng.uniform(0.07, 0.13))
        loudness, length = rng.uniform(4000, 16000), int(RATE * rng.uniform(0.07, 0.12))
        clip += [round(loudness * math.sin(2 * math.pi * hertz * step / RATE)) for step in range(length)]
    return clip


def write_clip(root: Path, number: int, pitches: list[float], rng: random.Random) -> dict[str, list[str]]:
    name, clip = f"clips/{number}.wav", samples(pitches, rng)
    (root / "clips").mkdir(parents=True, exist_ok=True)
    with wave.open(str(root / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{len(clip)}h", *clip))
    return {"audios": [name]}


def write_model(folder: Path) -> None:
    """A Qwen2-Audio of two layers in its tower and two in its decoder, with random weights, and its processor."""
    tokenizer = word_tokenizer(WORDS, SPECIAL, "<|audio_bos|><|AUDIO|><|audio_eos|>")
    hearing = WhisperFeatureExtractor(feature_size=40, sampling_rate=RATE, chunk_length=SECONDS)
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=hearing.feature_size, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128,
            d_model=64, max_source_positions=hearing.nb_max_frames // 2,
        ).to_dict(),
        text_config=Qwen2Config(
            hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    Qwen2AudioProcessor(hearing, tokenizer, chat_template=tokenizer.chat_template).save_pretrained(folder)
