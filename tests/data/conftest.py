"""Tokenizers, processors and files small enough to see every token and record."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from media_worlds import media_world

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}{{ '{' ~ part.type ~ '}' }}{% endif %}{% endfor %}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def template_of(kind: str, placeholder: str) -> str:
    """A processor's: roles in round brackets, and of media one kind."""
    parts = f"{{% elif part.type == '{kind}' %}}{placeholder}{{% endif %}}"
    ours = TEMPLATE.replace("{% else %}{{ '{' ~ part.type ~ '}' }}{% endif %}", parts)
    return ours.replace("[{{ message.role }}]", "({{ message.role }})").replace("[assistant]", "(assistant)")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no network: whatever looks for a host fails."""
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("local data must not touch the network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)  # not connect(): worker processes talk through local sockets


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    """One token a character, with a chat template whose turns end with ``<eos>`` and a line break."""
    tiny_tokenizer.chat_template = TEMPLATE
    return tiny_tokenizer


@pytest.fixture
def llava(chat_tokenizer: Any) -> Any:
    """A processor with a chat template of its own, whose images are 16 tokens of ``<image>``."""
    from transformers import LlavaProcessor

    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        media_world("llava").processor.image_processor,
        chat_tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template_of("image", "<image>"),
        num_additional_image_tokens=1,
    )


@pytest.fixture
def qwen2_audio(chat_tokenizer: Any) -> Any:
    """A processor with a chat template of its own; 0.3 seconds are 7 tokens of ``<|AUDIO|>``."""
    from transformers import Qwen2AudioProcessor

    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>"]})
    heard = media_world("qwen2_audio").processor.feature_extractor
    return Qwen2AudioProcessor(heard, chat_tokenizer, chat_template=template_of("audio", "<|AUDIO|>"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write records as a JSON Lines or JSON file; returns its path."""

    def write_records(records: list[Any], name: str = "records.jsonl") -> str:
        path = tmp_path / name
        lines = "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
        path.write_text(json.dumps(records) if name.endswith(".json") else lines)
        return str(path)

    return write_records
