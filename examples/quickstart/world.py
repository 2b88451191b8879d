"""What the tasks share: records as JSON Lines, and a tokenizer of whole words with a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
