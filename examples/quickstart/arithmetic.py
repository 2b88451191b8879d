"""The quickstart's world: two-digit addition, one token a character, everything made here."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from world import END, write_lines

TOKENS = ["<pad>", END, *"0123456789+="]
HELD_OUT = 1000
LESSONS = 40_000
# Above a half: the likeliest answer of a good pupil forgets. Well below one: a sampled answer remembers now and then.
FORGETS = 0.7

Pair = tuple[int, int]


def write(root: Path, seed: int, short: bool) -> str:
    """Tokenizer, lessons for supervised learning, prompts for reinforcement, held-out prompts; what they are in words.

    ``short`` changes nothing here: all of it is made in a second.
    """
    train, held_out = split_pairs(seed)
    write_tokenizer(root / "tokenizer")
    write_lessons(root / "lessons.jsonl", train, seed)
    write_prompts(root / "train.jsonl", train)
    write_prompts(root / "held_out.jsonl", held_out)
    return f"{len(train)} training and {len(held_out)} held-out sums"


def write_tokenizer(folder: Path) -> None:
    """One token a character, and an end of sequence."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>", model_max_length=32
    ).save_pretrained(folder)


def split_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """Operand pairs to train on, and others to hold out; no pair is in both, in either order."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    either_order = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
    return either_order[HELD_OUT:], either_order[:HELD_OUT]


def question(pair: Pair) -> str:
    return f"{pair[0]}+{pair[1]}="


def write_prompts(path: Path, pairs: Iterable[Pair]) -> None:
    """What reinforcement learning sees: the question, and the reference for the reward alone."""
    records = [{"input": question(p), "reference": str(sum(p)), "label": "exact_match"} for p in pairs]
    write_lines(path, records)


def write_lessons(path: Path, pairs: list[Pair], seed: int) -> None:
    """What supervised learning sees: questions answered by a teacher who often forgets to carry."""
    rng = random.Random(seed)
    lessons = [rng.choice(pairs) for _ in range(LESSONS)]
    write_lines(path, [{"prompt": question(p), "response": str(careless_sum(p, rng))} for p in lessons])


def careless_sum(pair: Pair, rng: random.Random) -> int:
    """Column addition in which each carry is forgotten with probability ``FORGETS``."""
    total, carry = 0, 0
    for place in (1, 10):
        column = pair[0] // place % 10 + pair[1] // place % 10 + carry
        carry = int(column > 9 and rng.random() >= FORGETS)
        total += column % 10 * place
    return total + 100 * carry
