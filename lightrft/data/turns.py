"""Which part of a conversation is learned: the assistant's turns, with the tokens that end them."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lightrft.data.chat import Chat
from lightrft.data.records import BadRecord, Message

Segment = tuple[str, bool]
"""Text, and whether it is learned."""


def conversation(messages: list[Message], chat: Chat) -> list[tuple[int, list[Segment]]]:
    """Cut a conversation into segments such that every assistant turn is learned as it is generated.

    What precedes a turn is what the model is given at inference: the template over the messages before it, with the
    opening of the turn. One sequence teaches all turns when the template only ever appends. Some templates rewrite
    earlier turns (they drop their reasoning); a turn that later ones no longer show as it was generated becomes a
    sequence of its own.

    Returns:
        Sequences in the order of their last turns: how many of the messages each shows, and a list of segments that
        joined are the rendered text.

    Raises:
        BadRecord: no assistant turn, one that nothing precedes, or a template that does not render turns in order.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRecord("it has no assistant turn to learn")
    if turns[0] == 0:
        raise BadRecord("it begins with an assistant turn, which answers nothing")
    sequences: list[tuple[int, str, list[tuple[int, int]]]] = []
    for turn in reversed(turns):
        start, text = _turn(messages[: turn + 1], chat)
        _, longer, spans = sequences[0] if sequences else (0, "", [])
        if longer.startswith(text) and len(text) <= spans[0][0]:
            spans.insert(0, (start, len(text)))
        else:
            sequences.insert(0, (turn + 1, text, [(start, len(text))]))
    return [(shown, _segments(text, spans)) for shown, text, spans in sequences]


def encode(segments: list[Segment], chat: Chat) -> tuple[Tensor, Tensor]:
    """Tokens of a conversation: int64 ``[L]``, and bool ``[L]`` that is ``True`` where a token is learned.

    Segments are tokenized apart, as prompt and response are at inference. White space that a template puts after the
    token that ends a turn is not learned: generation never reaches it.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for text, learned in segments:
        tokens = chat.text_ids(text)
        end = _turn_end(tokens, chat) if learned else 0
        ids += tokens
        mask += [position < end for position in range(len(tokens))]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)


def encode_pair(prompt: str, response: str, chat: Chat) -> tuple[Tensor, Tensor]:
    """Tokens of a raw prompt and its response, as :func:`encode` gives them; the response and its end are learned.

    The tokenizer must have a token that ends a sequence.

    Raises:
        BadRecord: the prompt has no tokens.
    """
    end = chat.tokenizer.eos_token_id
    given, tokens = chat.prompt_ids(prompt), chat.text_ids(response)
    tokens += [] if tokens[-1:] == [end] else [end]
    mask = [False] * len(given) + [True] * len(tokens)
    return torch.tensor(given + tokens, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)


def _turn(messages: list[Message], chat: Chat) -> tuple[int, str]:
    """The rendered messages, and where in them the last turn begins."""
    before, opened, text = chat.render(messages[:-1]), chat.prompt(messages[:-1]), chat.render(messages)
    # An opening may hold more than this turn does (a forced "<think>"): what both have is given, the rest is learned.
    given = 0
    while given < len(opened) and text[given : given + 1] == opened[given]:
        given += 1
    start = given if given == len(opened) else len(re.sub(r"<\w*$", "", text[:given]))  # "<table>" shares no "<t"
    if start < len(before) or not text[start:].strip():
        raise BadRecord("the chat template does not append the assistant's turn to the messages before it")
    return start, text


def _segments(text: str, spans: list[tuple[int, int]]) -> list[Segment]:
    segments: list[Segment] = []
    done = 0
    for start, end in spans:
        segments += [(text[done:start], False), (text[start:end], True)]
        done = end
    return segments


def _turn_end(tokens: list[int], chat: Chat) -> int:
    last = max((i for i, token in enumerate(tokens) if token in chat.special_ids), default=len(tokens) - 1)
    return len(tokens) if chat.tokenizer.decode(tokens[last + 1 :]).strip() else last + 1
