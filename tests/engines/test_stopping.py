"""A stop string that begins in one segment of a response and ends in the next ends it where it would have anyway."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightrft.engines.stopping import Detokenizer, StopStrings, stop_across

END = 0


@pytest.fixture(scope="module")
def detokenizer(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    """Tokens of one to three letters, one of them a special one."""
    words = ["<end>", "a", "b", "ab", "ba", "aab", " ", "é"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return Detokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"))


def whole_end(tokens: list[int], stops: list[str], detokenizer: Detokenizer) -> int | None:
    """Where the engine's own criterion ends the response that nothing interrupts."""
    criterion = StopStrings(stops, frozenset({END}), 1, detokenizer)
    for count in range(1, len(tokens) + 1):
        criterion(torch.tensor([tokens[:count]]), None)
    return criterion.ends.get(0)


@given(
    st.lists(st.integers(1, 8), min_size=2, max_size=24),
    st.lists(st.text("ab é", min_size=1, max_size=5), max_size=3),
    st.data(),
)
def test_cut_anywhere_it_ends_where_it_would_whole(
    detokenizer: Detokenizer, tokens: list[int], stops: list[str], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(tokens) - 1))
    end = whole_end(tokens, stops, detokenizer) if stops else None
    if end is not None and end <= cut:
        return  # the first segment ended by itself
    before, after = tokens[:cut], tokens[cut:]
    own = whole_end(after, stops, detokenizer) if stops else None
    found = stop_across(before, after[:own], stops, detokenizer)
    ends = found if found is not None else own
    assert (None if ends is None else cut + ends) == end


def test_without_stop_strings_nothing_is_read(detokenizer: Detokenizer) -> None:
    assert stop_across([1, 2], [3], [], detokenizer) is None


def test_the_token_that_completes_it_is_the_last(detokenizer: Detokenizer) -> None:
    assert stop_across([1, 1], [1, 2, 1, 2], ["aaab"], detokenizer) == 2
    assert stop_across([1, 1], [END, 3, 1], ["aaab"], detokenizer) == 2
    assert stop_across([1, 1], [1, 1, 1], ["aaab"], detokenizer) is None
