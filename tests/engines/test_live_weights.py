"""Weights found where a model's own loader puts them: fused, cut over ranks, copied twice, passed over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightrft.engines import EngineError
from lightrft.engines.float8 import per_row
from lightrft.engines.sglang.float8_layers import in_rows
from lightrft.engines.sglang.live_weights import LiveWeights, whole_fingerprint
from lightrft.ops.fingerprint import fingerprint

WEIGHTS = {
    "q.weight": torch.randn(8, 6),
    "k.weight": torch.randn(2, 6),
    "out.weight": torch.randn(6, 8),
    "head.weight": torch.randn(10, 6),
    "norm": torch.randn(6),
}


class Rank(nn.Module):
    """One of two ranks of a model that loads as serving engines' do."""

    def __init__(self, rank: int, ranks: int = 2) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.fused = nn.Parameter(torch.zeros(8 // ranks + 2, 6))  # part of q, and all of k on every rank
        self.out = nn.Parameter(torch.zeros(6, 8 // ranks))
        self.head = nn.Parameter(torch.zeros(8, 6))  # padded: the second rank has fewer rows
        self.second_head = nn.Parameter(torch.zeros(8, 6))
        self.norm = nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "q.weight":
                size = 8 // self.ranks
                self.fused.data[:size].copy_(tensor.narrow(0, self.rank * size, size))
            elif name == "k.weight":
                assert tensor.shape == (2, 6)
                self.fused.data[-2:].copy_(tensor)
            elif name == "out.weight":
                size = 8 // self.ranks
                self.out.data.copy_(tensor.narrow(1, self.rank * size, size))
            elif name == "head.weight":
                rows = tensor[self.rank * 8 : self.rank * 8 + 8]
                self.head.data[: len(rows)].copy_(rows)
                self.second_head[: len(rows)] = rows
            elif name == "norm":
                self.norm.data.copy_(tensor)


def loaded() -> list[LiveWeights]:
    ranks = [LiveWeights(Rank(rank)) for rank in range(2)]
    for rank in ranks:
        rank.load([((name,), tensor) for name, tensor in WEIGHTS.items()])
    return ranks


def prints(ranks: list[LiveWeights], names: Sequence[str] = tuple(WEIGHTS)) -> dict[str, object]:
    held = [rank.held(names) for rank in ranks]
    return {name: whole_fingerprint([part for one in held for part in one[name]]) for name in names}


def test_fingerprints_are_of_the_whole_tensors_in_the_models_dtype():
    expected = {name: fingerprint(tensor) for name, tensor in WEIGHTS.items()}
    expected["norm"] = fingerprint(WEIGHTS["norm"].bfloat16())
    assert prints(loaded()) == expected


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("parameter", "row", "name"),
    [("fused", 0, "q.weight"), ("fused", -1, "k.weight"), ("out", 2, "out.weight"), ("second_head", 1, "head.weight")],
)
def test_a_change_of_what_any_rank_computes_with_is_seen_and_of_that_weight_alone(rank, parameter, row, name):
    ranks = loaded()
    before = prints(ranks)
    with torch.no_grad():
        getattr(ranks[rank]._model, parameter)[row] += 1e-3
    after = prints(ranks)
    assert {one for one in WEIGHTS if before[one] != after[one]} == {name}


def test_what_the_loader_passes_over_or_refuses_is_named():
    live = LiveWeights(Rank(0))
    with pytest.raises(EngineError, match=r"no place.*nonsense"):
        live.load([(("nonsense", "more of it"), torch.zeros(3))])
    with pytest.raises(EngineError, match=r"k\.weight"):
        live.load([(("k.weight",), torch.zeros(3, 6))])
    with pytest.raises(EngineError, match=r"norm.*not been pushed"):
        live.held(["norm"])


def test_it_is_taken_by_whatever_name_the_loader_knows_and_held_by_the_first():
    ranks = [LiveWeights(Rank(rank)) for rank in range(2)]
    for rank in ranks:
        for _ in range(2):  # the second time by the name that was found
            rank.load([((f"model.{name}", "nonsense", name), tensor) for name, tensor in WEIGHTS.items()])
        with pytest.raises(EngineError, match=r"cannot take 'model\.k\.weight'"):
            rank.load([(("model.k.weight", "k.weight"), torch.zeros(3, 6))])
    held = [rank.held([f"model.{name}" for name in WEIGHTS if name != "norm"]) for rank in ranks]
    for name in WEIGHTS.keys() - {"norm"}:
        assert whole_fingerprint([part for one in held for part in one[f"model.{name}"]]) == fingerprint(WEIGHTS[name])


class InEightBits(nn.Module):
    """One of two ranks whose layers were quantised behind their loader: columns of ``qk`` are cut, rows of ``out``."""

    def __init__(self, rank: int, ranks: int = 2) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.qk, self.out = Quantised(8 // ranks + 2, 6), Quantised(6, 8 // ranks)
        self.head = nn.Parameter(torch.zeros(8, 6))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "q.weight":
                size = 8 // self.ranks
                self.qk.weight[:size].copy_(tensor.narrow(0, self.rank * size, size))
            elif name == "k.weight":
                self.qk.weight[-2:].copy_(tensor)
            elif name == "out.weight":
                size = 8 // self.ranks
                self.out.weight.copy_(tensor.narrow(1, self.rank * size, size))
            elif name == "head.weight":
                self.head.copy_(tensor)


class Quantised(nn.Module):
    """Computes with columns of 8 bits, and loads rows."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        loads = nn.Parameter(torch.zeros(rows, width), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(rows, width, dtype=torch.float8_e4m3fn).t(), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.zeros(1, rows), requires_grad=False)
        self.in_rows = in_rows(loads, self.weight, self.weight_scale)

    def matrix(self) -> Tensor:
        return self.weight.float().t() * self.weight_scale.t()


IN_EIGHT_BITS = {"q.weight", "k.weight", "out.weight"}


def loaded_in_float8() -> list[LiveWeights]:
    ranks = [LiveWeights(InEightBits(rank)) for rank in range(2)]
    for rank in ranks:
        weights = {name: WEIGHTS[name] for name in IN_EIGHT_BITS} | {"head.weight": torch.randn(8, 6)}
        before = {name: one.clone() for name, one in rank._model.state_dict().items()}
        found = rank.find_float8({name: ((name,), tuple(one.shape)) for name, one in weights.items()})
        assert found == IN_EIGHT_BITS
        assert all(torch.equal(before[name].float(), one.float()) for name, one in rank._model.state_dict().items())
        for _ in range(2):
            rank.load([((name,), tensor) for name, tensor in weights.items()])
    return ranks


def test_in_8_bits_ranks_hold_parts_of_what_the_whole_is_quantised_to_and_compute_with_it():
    ranks = loaded_in_float8()
    for name in IN_EIGHT_BITS:
        weight, scale = per_row(WEIGHTS[name])
        expected = {name: fingerprint(weight), f"{name}_scale": fingerprint(scale)}
        assert prints(ranks, list(expected)) == expected
    for rank, live in enumerate(ranks):
        model = live._model
        wanted = torch.cat([WEIGHTS["q.weight"][4 * rank : 4 * rank + 4], WEIGHTS["k.weight"]])
        assert torch.allclose(model.qk.matrix(), wanted, rtol=0.07)
        assert torch.allclose(model.out.matrix(), WEIGHTS["out.weight"][:, 4 * rank : 4 * rank + 4], rtol=0.07)
        assert model.qk.weight.shape == (6, 6)  # as it computes
        assert model.out.weight.shape == (4, 6)


@pytest.mark.parametrize("layer", ["qk", "out"])
@pytest.mark.parametrize("kind", ["weight", "weight_scale"])
def test_in_8_bits_a_change_of_bits_or_of_scales_is_seen(layer, kind):
    ranks = loaded_in_float8()
    names = [f"{name}{end}" for name in IN_EIGHT_BITS for end in ("", "_scale")]
    before, changed = prints(ranks, names), getattr(getattr(ranks[1]._model, layer), kind)
    changed.data.view(torch.int8 if kind == "weight" else torch.int32)[0, 0] ^= 1
    after = prints(ranks, names)
    (name,) = {one for one in names if before[one] != after[one]}
    assert name == {"qk": "q.weight", "out": "out.weight"}[layer] + ("_scale" if kind == "weight_scale" else "")


def test_kernels_that_want_8_bits_otherwise_are_refused():
    weight = torch.zeros(6, 4, dtype=torch.float8_e4m3fn)
    with pytest.raises(EngineError, match=r"scale for each row.*VLLMEngine"):
        in_rows(nn.Parameter(torch.zeros(4, 6), requires_grad=False), weight.t().contiguous().t(), torch.ones(1))
    with pytest.raises(EngineError, match=r"scale for each row"):
        in_rows(nn.Parameter(torch.zeros(4, 6), requires_grad=False), weight, torch.ones(4))
