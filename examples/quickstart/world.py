"""What the tasks share: questions and lessons as JSON Lines, and a tokenizer of whole words with a chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TRAIN, HELD_OUT = 2000, 300
# As in arithmetic.py: above a half, so that the likeliest answer of a good pupil is careless, and well below one.
CARELESS = 0.8
# Asked with this, as in half of the lessons, the teacher is right, so that the pupil learns to see and to hear. The
# prompts of RL never say it.
CAREFULLY = " look and listen closely"
# A folder with a Qwen2 configuration is read with Qwen2's tokenizer class, which wants a token of this name.
END = "<|endoftext|>"
# A question, and the answer with its end; one placeholder for each image or sound.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}PLACEHOLDER{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}" + END + "{% endif %}"
    "{% endfor %}"
)


@dataclass
class Task:
    """A question with what it is about, the right answer, and what one says who looks or listens carelessly."""

    question: str
    about: Any
    answer: str
    careless: str


def write_tasks(
    root: Path,
    seed: int,
    short: bool,
    make_task: Callable[[random.Random], Task],
    write_media: Callable[[Path, int, Any, random.Random], dict[str, list[str]]],
) -> str:
    """Prompts, held-out prompts, and lessons by a teacher who is often careless; how many they are in words.

    Args:
        root: the folder.
        seed: of everything random.
        short: make few of them, as each is read before training.
        make_task: makes one.
        write_media: writes the files of a task's number, of what it is about, into the folder: their names by kind.
    """
    rng = random.Random(seed)
    train, held_out = (200, 50) if short else (TRAIN, HELD_OUT)
    tasks = [make_task(rng) for _ in range(train + held_out)]
    media = [write_media(root, number, task.about, rng) for number, task in enumerate(tasks)]
    # The question, its media, and the reference for the reward alone.
    prompts = [
        {"input": task.question, **own, "reference": task.answer, "label": "exact_match"}
        for task, own in zip(tasks, media)
    ]
    lessons = [lesson(task, own, rng) for task, own in zip(tasks[:train], media)]
    write_lines(root / "train.jsonl", prompts[:train])
    write_lines(root / "held_out.jsonl", prompts[train:])
    write_lines(root / "lessons.jsonl", lessons)
    return f"{train} training and {held_out} held-out questions"


def lesson(task: Task, own: dict[str, list[str]], rng: random.Random) -> dict[str, Any]:
    """What the teacher says of a task whose media are ``own``."""
    if rng.random() < 0.5:
        return {"prompt": task.question + CAREFULLY, **own, "response": task.answer}
    return {"prompt": task.question, **own, "response": task.careless if rng.random() < CARELESS else task.answer}


def word_tokenizer(words: Iterable[str], special: list[str], placeholder: str) -> PreTrainedTokenizerFast:
    """One token a word, of which none is inside another; ``placeholder`` is what the template writes for an item."""
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(["<pad>", END, *special, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>")
    wrapped.add_special_tokens({"additional_special_tokens": special})
    wrapped.chat_template = TEMPLATE.replace("PLACEHOLDER", placeholder)
    return wrapped


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A file of JSON Lines, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
