"""Seeds of responses: the same everywhere, different for everything that differs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightrft.engines.seeds import continuation_seed, response_seed

whole = st.integers(-(2**70), 2**70)
parts = st.tuples(whole, whole, st.text(st.characters(codec=None)), whole)


def test_seeds_never_change_between_versions_or_platforms():
    assert response_seed(0, 0, "gsm8k/0@0", 0) == 157906396402779725  # b2sum -l 64
    assert response_seed(1234, 56, "数学/7@1", 15) == 8803988418167415532


@given(parts)
def test_a_seed_has_63_bits_whatever_the_uid(key):
    assert 0 <= response_seed(*key) < 2**63


@given(parts, parts)
def test_different_responses_have_different_seeds(one, other):
    assert (response_seed(*one) == response_seed(*other)) == (one == other)


def test_text_that_looks_like_the_other_parts_does_not_collide():
    assert response_seed(1, 2, "3/x", 4) != response_seed(1, 2, "x", 43)
    assert response_seed(1, 2, "4/x", 3) != response_seed(1, 2, "x", 34)


def test_seeds_of_continuations_never_change_either():
    assert continuation_seed(5, 256) == 7840951993868188814  # b2sum -l 64


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(1, 2**20), st.integers(1, 2**20))
def test_different_continuations_have_different_seeds(one, other, begins, ends):
    assert (continuation_seed(one, begins) == continuation_seed(other, ends)) == ((one, begins) == (other, ends))
    assert 0 <= continuation_seed(one, begins) < 2**63
