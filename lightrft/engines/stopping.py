"""Where a response ends, and what it says: stop ids, stop strings, decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, StoppingCriteria


class Detokenizer:
    """Decodes responses without special tokens; ids the tokenizer does not know decode to nothing.

    A model's vocabulary is often padded beyond its tokenizer's, so such ids can be drawn.

    Args:
        tokenizer: the actor's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self._special = set(tokenizer.all_special_ids) | {index for index, token in added if token.special}
        self._visible = set(tokenizer.get_vocab().values()) - self._special
        self._tokenizer = tokenizer

    def visible(self, token: int) -> bool:
        """Whether the token adds to the text."""
        return token in self._visible

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text exactly as written: nothing tidied up."""
        visible = [token for token in token_ids if token in self._visible]
        return str(self._tokenizer.decode(visible, clean_up_tokenization_spaces=False))

    def decode_all(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """:meth:`decode` of each, at once where the tokenizer can."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            return [self.decode(tokens) for tokens in responses]
        visible = [[token for token in tokens if token in self._visible] for tokens in responses]
        return list(self._tokenizer.backend_tokenizer.decode_batch(visible, skip_special_tokens=False))

    def special_id(self, text: str) -> int | None:
        """Id of the special token that ``text`` is, if it is one: its text is never decoded."""
        token = self._tokenizer.get_vocab().get(text)
        return token if token in self._special else None


class Tail:
    """The end of one response's text, in which a stop string is looked for, be it inside one token or across many.

    Args:
        stops: the strings.
        detokenizer: what decodes.

    Attributes:
        window: most visible tokens over which a string lies.
    """

    def __init__(self, stops: Sequence[str], detokenizer: Detokenizer) -> None:
        self._stops = stops
        self._detokenizer = detokenizer
        # A visible token is a byte or more. The few before them keep what decoders strip at a start out of the match.
        self.window = max(len(stop.encode("utf-8", "surrogatepass")) for stop in stops) + 4
        self._tokens: deque[int] = deque(maxlen=self.window)

    def completed_by(self, token: int) -> bool:
        """Take the response's next token; whether it completes a stop string."""
        if not self._detokenizer.visible(token):
            return False
        self._tokens.append(token)
        text = self._detokenizer.decode(self._tokens)
        return any(stop in text for stop in self._stops)


class StopStrings(StoppingCriteria):
    """Ends a row at the token that completes a stop string.

    Args:
        stops: the strings.
        stop_ids: ids that end a row by themselves.
        rows: rows of the batch.
        detokenizer: what decodes.

    Attributes:
        ends: tokens of the response, by row, for the rows that a stop string ended.
    """

    def __init__(self, stops: Sequence[str], stop_ids: frozenset[int], rows: int, detokenizer: Detokenizer) -> None:
        self.ends: dict[int, int] = {}
        self._stop_ids = stop_ids
        self._length = 0
        self._tails = {row: Tail(stops, detokenizer) for row in range(rows)}

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        self._length += 1
        newest = input_ids[:, -1].tolist()
        for row, tail in list(self._tails.items()):
            if newest[row] in self._stop_ids:
                del self._tails[row]
            elif tail.completed_by(newest[row]):
                self.ends[row] = self._length
                del self._tails[row]
        done = torch.zeros(len(newest), dtype=torch.bool)
        done[list(self.ends)] = True
        return done.to(input_ids.device)


def stop_across(
    before: Sequence[int], after: Sequence[int], stops: Sequence[str], detokenizer: Detokenizer
) -> int | None:
    """Where a stop string that begins in one part of a response ends in the next.

    Args:
        before: tokens so far, which complete none.
        after: those that follow, in which a string from beginning to end would have ended them.
        stops: the strings; there may be none.
        detokenizer: what decodes.

    Returns:
        the tokens of ``after`` up to the one that completes it; ``None`` where there is none.
    """
    if not stops:
        return None
    tail = Tail(stops, detokenizer)
    for token in [token for token in before if detokenizer.visible(token)][-tail.window :]:
        tail.completed_by(token)
    # What begins before has ended within the window.
    visible = [position for position, token in enumerate(after, 1) if detokenizer.visible(token)]
    return next((position for position in visible[: tail.window] if tail.completed_by(after[position - 1])), None)


def response_length(token_ids: Sequence[int], stop_ids: frozenset[int]) -> int:
    """Tokens up to and with the first stop id; all of them where there is none."""
    return next((position for position, token in enumerate(token_ids, 1) if token in stop_ids), len(token_ids))


def before_stop(text: str, stops: Sequence[str]) -> str:
    """``text`` cut before the first of the stop strings."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
