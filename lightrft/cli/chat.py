"""``lightrft chat FOLDER``: talk to a trained model, or answer one prompt, on ``transformers``' own ``generate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

_END = {"exit", "quit"}


def chat(
    folder: str,
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 1024,
) -> None:
    """Talk to a model; each line of standard input is one turn, end of file or ``exit`` ends.

    With a chat template in the folder the conversation is kept; without one every line is continued as raw text. What
    is not given here follows the folder's ``generation_config.json``.

    Args:
        folder: Hugging Face folder with weights and tokenizer.
        prompt: answer this alone instead of reading standard input.
        system: system message before the conversation; needs a chat template.
        temperature: divides the logits; 0 is greedy.
        max_new_tokens: longest answer in tokens.

    Raises:
        SystemExit: there is no such folder, a number is out of range, or a system message without a chat template.
    """
    if not (Path(folder) / "config.json").is_file():
        raise SystemExit(
            f"{folder!r} is no Hugging Face folder (it has no config.json); give the path of an exported one."
        )
    if temperature < 0 or max_new_tokens < 1:
        raise SystemExit("--temperature must be 0 (greedy) or more, and --max_new_tokens at least 1.")
    model, tokenizer = _load(folder)
    if system is not None and tokenizer.chat_template is None:
        raise SystemExit(f"{folder!r} has no chat template, so --system has no place; leave it out.")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    options = {"max_new_tokens": max_new_tokens, **sampling}
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _lines() if prompt is None else [prompt]:
        if tokenizer.chat_template is None:
            messages = []
        messages.append({"role": "user", "content": line})
        answer = _answer(model, tokenizer, messages, options)
        messages.append({"role": "assistant", "content": answer})


def _load(folder: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    from lightrft.engines.skeleton import auto_model

    auto = auto_model(AutoConfig.from_pretrained(folder))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return auto.from_pretrained(folder, dtype="auto").eval().to(device), AutoTokenizer.from_pretrained(folder)


def _lines() -> Iterator[str]:
    """Lines a person types, with a mark to type at when it is a person."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() in _END:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print the answer to the last message as it comes, and return it."""
    from transformers import TextStreamer

    if tokenizer.chat_template is None:
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt", return_token_type_ids=False)
    else:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if inputs["input_ids"].shape[1] == 0:
        raise SystemExit("The prompt has no tokens; write something.")
    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **options)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main(argv: list[str] | None = None) -> None:
    """The command line of :func:`chat`."""
    with suppress(KeyboardInterrupt):
        auto_cli(chat, args=argv, prog="lightrft chat")


if __name__ == "__main__":
    main()
