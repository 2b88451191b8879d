"""The vision quickstart's world: coloured shapes, and questions about one image or two; everything made here."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from world import CAREFULLY, Task, word_tokenizer, write_tasks

CELL = 28  # pixels: what the model makes one token of
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 200, 40)}
SHAPES = ("square", "circle", "triangle")
# What one says who looks carelessly: the colour that is easily taken for it, the place in the mirror.
MISTAKEN = {"red": "green", "green": "red", "blue": "yellow", "yellow": "blue"}
MISTAKEN |= {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
PLACES = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2)}  # column and row of three
QUESTIONS = {
    "count": "<image>how many shapes ?",
    "colour": "<image>which colour ?",
    "place": "<image>where is it ?",
    "more": "<image><image>which image has more ?",
}
COUNTS = ("one", "two", "three", "four")
GRIDS = ((2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2))  # columns and rows
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = (
    " ".join([*QUESTIONS.values(), CAREFULLY, *COUNTS, *COLOURS, *PLACES, "first second"])
    .replace("<image>", "")
    .split()
)


@dataclass
class Shape:
    """One shape in a cell of an image's grid."""

    kind: str
    colour: str
    column: int
    row: int


@dataclass
class Picture:
    """A grid of cells, some with a shape."""

    columns: int
    rows: int
    shapes: list[Shape] = field(default_factory=list)


def write(root: Path, seed: int, short: bool) -> str:
    """The untrained model with its processor, and :func:`world.write_tasks`."""
    torch.manual_seed(seed)
    write_model(root / "untrained")
    return f"{write_tasks(root, seed, short, make_task, write_images)} about images"


def make_task(rng: random.Random) -> Task:
    """A question of one of four kinds; each kind has a mistake of its own."""
    kind = rng.choice(list(QUESTIONS))
    if kind == "count":
        number = rng.randint(2, 4)  # careless: overlooks one
        return Task(QUESTIONS[kind], [picture(rng, number)], COUNTS[number - 1], COUNTS[number - 2])
    if kind == "colour":
        colour = rng.choice(list(COLOURS))
        return Task(QUESTIONS[kind], [picture(rng, rng.randint(1, 3), colour)], colour, MISTAKEN[colour])
    if kind == "place":
        place = rng.choice(list(PLACES))
        shape = Shape(rng.choice(SHAPES), rng.choice(list(COLOURS)), *PLACES[place])
        return Task(QUESTIONS[kind], [Picture(3, 3, [shape])], place, MISTAKEN[place])
    few, many = sorted(rng.sample(range(1, 5), 2))  # careless: looks at the first alone
    answer = rng.choice(["first", "second"])
    numbers = [many, few] if answer == "first" else [few, many]
    return Task(QUESTIONS[kind], [picture(rng, number) for number in numbers], answer, "first")


def picture(rng: random.Random, number: int, colour: str | None = None) -> Picture:
    """So many shapes in an image of random size, of one colour or of random ones."""
    columns, rows = rng.choice(GRIDS)
    cells = rng.sample([(column, row) for column in range(columns) for row in range(rows)], number)
    shapes = [Shape(rng.choice(SHAPES), colour or rng.choice(list(COLOURS)), *cell) for cell in cells]
    return Picture(columns, rows, shapes)


def draw(picture: Picture, rng: random.Random) -> Image.Image:
    """On white; size and place of a shape inside its cell are random."""
    image = Image.new("RGB", (picture.columns * CELL, picture.rows * CELL), "white")
    pen = ImageDraw.Draw(image)
    for shape in picture.shapes:
        size = rng.randint(14, 24)
        left = shape.column * CELL + rng.randint(2, CELL - 2 - size)
        top = shape.row * CELL + rng.randint(2, CELL - 2 - size)
        right, bottom = left + size, top + size
        if shape.kind == "triangle":
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], COLOURS[shape.colour])
        else:
            form = pen.ellipse if shape.kind == "circle" else pen.rectangle
            form((left, top, right, bottom), COLOURS[shape.colour])
    return image


def write_images(root: Path, number: int, pictures: list[Picture], rng: random.Random) -> dict[str, list[str]]:
    names = [f"images/{number}-{index}.png" for index in range(len(pictures))]
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name, one in zip(names, pictures):
        draw(one, rng).save(root / name)
    return {"images": names}


def write_model(folder: Path) -> None:
    """A Qwen2.5-VL of two layers in its tower and two in its decoder, with random weights, and its processor."""
    tokenizer = word_tokenizer(WORDS, SPECIAL, "<|vision_start|><|image_pad|><|vision_end|>")
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 128,
            "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            # Columns turn the slowest frequencies, which a usual base of 10000 would leave still within ten cells.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
            "window_size": 112, "fullatt_block_indexes": [1], "initializer_range": 0.05,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    size = {"shortest_edge": CELL * CELL, "longest_edge": 16 * CELL * CELL}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template).save_pretrained(folder)
