"""Rows travel to the rank that computes them, bit by bit, and what is said of them travels back; on real ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from trainer import tiny_run
from transformers import AutoConfig

from lightrft.algorithms import Algorithm
from lightrft.learner import Learner
from lightrft.ops import CostModel
from lightrft.samples import Batch
from lightrft.sequence_cost import SequenceCost
from lightrft.strategies import Layout, Roles, make_fabric, sharding_of
from lightrft.workload import Workload

BUDGET, LONGEST = 30, 12


def batch_of(rank: int, rows: int = 6, trained: int | None = None) -> Batch:
    """Rows of different lengths and a width of this rank's own, random in every column; some are not trained on."""
    generator = torch.Generator().manual_seed(rank)
    responses = torch.randint(0, LONGEST - rank, (rows,), generator=generator)
    prompts = torch.randint(1, 6, (rows,), generator=generator)
    width = int(responses.max().clamp_min(1))
    mask = (torch.arange(width) < responses[:, None]) & (torch.rand(rows, width, generator=generator) < 0.9)
    mask[rows if trained is None else trained :] = False
    batch = Batch(
        sequences=[torch.randint(2, 14, (n,), generator=generator) for n in (prompts + responses).tolist()],
        prompt_lengths=prompts,
        response_mask=mask,
        group_ids=torch.arange(rows) // 2,
        rewards=torch.rand(rows, generator=generator),
        log_probs_rollout=-torch.rand(rows, width, generator=generator),
    )
    for name, column in batch.columns.items():
        if column.dtype == torch.float32 and name != "rewards":
            column.copy_(torch.randn(column.shape, generator=generator))
    batch.truncated[::2] = True
    return batch


def row_of(batch: Batch, row: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A row's sequence, and every column of it without padding."""
    length = int(batch.response_lengths[row])
    columns = {n: column[row, :length] if column.ndim == 2 else column[row] for n, column in batch.columns.items()}
    return batch.sequences[row], columns


class Seen(NamedTuple):
    """What a rank has of a workload, and what comes back to it."""

    micro_batches: list[Batch]
    returned: list[Tensor]
    busiest_over_mean: float


def _spread(ranks: int, sequence_parallel_size: int, rows: int, trained: int | None) -> Seen:
    fabric = make_fabric("ddp", "32-true", accelerator="cpu", devices=ranks)
    fabric.launch()
    layout = Layout(ranks, fabric.global_rank, sequence_parallel_size)
    batch = batch_of(fabric.global_rank, rows, trained)
    work = Workload(batch, SequenceCost(CostModel(0.01)), BUDGET, layout, sharding_of(fabric))
    # As a model would: something of each token, 0 outside the mask, and a second thing.
    found = [[torch.where(p.response_mask, p.log_probs_old * 2, 0.0), p.values_old] for p in work.micro_batches]
    return Seen(work.micro_batches, work.collect(found), work.busiest_over_mean)


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel_size", "rows", "trained"),
    [(1, 1, 6, None), (2, 1, 6, None), (4, 1, 6, None), (4, 2, 6, None), (2, 2, 6, None), (4, 1, 2, 1), (2, 1, 3, 0)],
)
def test_every_row_is_computed_by_one_group_and_comes_back(
    ranks: int, sequence_parallel_size: int, rows: int, trained: int | None
) -> None:
    seen = on_ranks(ranks, _spread, ranks, sequence_parallel_size, rows, trained)
    owned = [batch_of(rank, rows, trained) for rank in range(ranks)]
    wanted = [(batch, row) for batch in owned for row in batch.response_mask.any(-1).nonzero().flatten().tolist()]
    held = [part for one in seen[::sequence_parallel_size] for part in one.micro_batches]
    real = [row_of(part, row) for part in held for row in range(len(part)) if part.response_mask[row].any()]
    assert len(real) == len(wanted)
    for batch, row in wanted:
        assert sum(same(one, row_of(batch, row)) for one in real) == 1
    assert len({len(one.micro_batches) for one in seen}) == 1
    assert len({one.busiest_over_mean for one in seen}) == 1 and seen[0].busiest_over_mean >= 1
    assert all(sum(part.sequence_lengths) <= BUDGET * sequence_parallel_size or len(part) == 1 for part in held)
    for batch, one in zip(owned, seen):
        trained = batch.response_mask.any(-1)
        within = torch.arange(batch.response_mask.shape[1]) < batch.response_lengths[:, None]
        assert torch.equal(one.returned[0], torch.where(batch.response_mask, batch.log_probs_old * 2, 0.0))
        assert torch.equal(one.returned[1], torch.where(trained[:, None] & within, batch.values_old, 0.0))


def test_the_ranks_of_a_group_hold_the_same_rows() -> None:
    seen = on_ranks(4, _spread, 4, 2, 6, None)
    for one, peer in (seen[:2], seen[2:]):
        for part, other in zip(one.micro_batches, peer.micro_batches, strict=True):
            assert len(part) == len(other)
            assert all(same(row_of(part, row), row_of(other, row)) for row in range(len(part)))
    # Each of two ranks holds half of the tokens, so there may be twice as many.
    assert any(sum(part.sequence_lengths) > BUDGET for part in seen[0].micro_batches)


def same(left: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]]) -> bool:
    """Whether two rows are, bit by bit."""
    return torch.equal(left[0], right[0]) and all(
        value.dtype == right[1][name].dtype and torch.equal(value, right[1][name]) for name, value in left[1].items()
    )


def test_fewer_rows_than_ranks_leave_micro_batches_of_one_token() -> None:
    seen = on_ranks(4, _spread, 4, 1, 2, 1)
    real = sum(bool(batch_of(rank, 2, 1).response_mask.any()) for rank in range(4))
    (parts,) = zip(*(one.micro_batches for one in seen))
    empty = [part for part in parts if not part.response_mask.any()]
    assert 0 < len(empty) == 4 - real
    assert all(part.sequence_lengths == [1] for part in empty)


def test_ranks_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence_parallel_size=2 does not divide 3 rank"):
        Layout(3, 0, 2)
    layout = Layout(6, 3, 2)
    assert (layout.groups, layout.group, layout.leads, layout.leader(1)) == (3, 1, False, 2)


@pytest.mark.parametrize(
    ("family", "options", "weights"),
    [
        (
            "qwen3",
            {"intermediate_size": 96, "head_dim": 32, "num_key_value_heads": 2},
            64 * (2 * 128 + 2 * 64 + 3 * 96),
        ),
        # A token visits two of the eight experts.
        (
            "qwen3_moe",
            {"moe_intermediate_size": 40, "num_experts_per_tok": 2, "num_experts": 8, "head_dim": 16},
            64 * (4 * 64 + 3 * 80),
        ),
        ("mixtral", {"intermediate_size": 40, "num_experts_per_tok": 2}, 64 * (2 * 64 + 2 * 128 + 3 * 80)),
        ("gpt2", {}, 64 * (4 * 64 + 3 * 256)),
    ],
)
def test_the_cost_is_of_the_actors_shape(family: str, options: dict[str, Any], weights: int) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
    config = AutoConfig.for_model(family, **shape, **options)
    model: Any = SimpleNamespace(config=config)
    size = getattr(config, "head_dim", None) or 16
    assert SequenceCost.of(model).decoder.attention == pytest.approx(3 * 4 * size / (3 * weights + 64 * 50))


# --- an update -------------------------------------------------------------------------------------------------------


class Update(NamedTuple):
    weights: dict[str, Tensor]
    prepared: dict[str, float]
    metrics: dict[str, float]
    batch: Batch


def _update(
    inputs: str, ranks: int, sequence_parallel_size: int = 1, strategy: str = "auto", trained: int | None = None
) -> Update:
    """Prepare and take one step with the rows of four owners, which so many ranks own; ``trained`` of the first's."""
    fabric = make_fabric(strategy, "32-true" if strategy == "fsdp2" else "64-true", accelerator="cpu", devices=ranks)
    fabric.launch()
    torch.manual_seed(0)
    with fabric.init_module():
        module = tiny_run.module(Path(inputs), Algorithm("grpo", kl_coefficient=0.1))
        module.configure_model()
    learner = Learner(fabric, Roles(fabric, {}), module, BUDGET, 1.0, sequence_parallel_size)
    counts = [None] * 4 if trained is None else [trained, 0, 0, 0]
    whole = joined([batch_of(owner, trained=count) for owner, count in enumerate(counts)])
    size = len(whole) // ranks
    batch = whole.select(range(fabric.global_rank * size, (fabric.global_rank + 1) * size))
    prepared = learner.prepare(batch, 1.0, LONGEST, len(batch))
    metrics = learner.update(batch, 1.0, LONGEST)
    weights = {name: weight.clone() for name, weight in module.export_parameters()}
    return Update(weights, prepared, metrics, batch)


def joined(batches: list[Batch]) -> Batch:
    width = max(batch.response_mask.shape[1] for batch in batches)
    columns: dict[str, Any] = {}
    for name in batches[0].columns:
        parts = [batch.columns[name] for batch in batches]
        if parts[0].ndim == 2:
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        columns[name] = torch.cat(parts)
    columns["group_ids"] = torch.arange(len(columns["rewards"])) // 2
    return Batch(sequences=[sequence for batch in batches for sequence in batch.sequences], **columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.write_inputs(tmp_path_factory.mktemp("inputs")))


@pytest.mark.parametrize(
    ("ranks", "sequence_parallel_size", "strategy", "trained"),
    # What the ranks of a group compute alike counts once. With fewer rows than groups, some ranks have nothing to
    # compute but keep the collectives in step.
    [
        (2, 1, "ddp", None),
        (4, 1, "ddp", None),
        (4, 1, "ddp", 2),
        (4, 2, "ddp", None),
        (4, 2, "ddp", 1),
        (2, 1, "fsdp2", None),
        (4, 1, "fsdp2", 2),
        (4, 2, "fsdp2", None),
    ],
)
def test_a_step_is_that_of_one_rank(
    folder: str, ranks: int, sequence_parallel_size: int, strategy: str, trained: int | None
) -> None:
    (alone,) = on_ranks(1, _update, folder, 1, 1, "auto", trained)
    several = on_ranks(ranks, _update, folder, ranks, sequence_parallel_size, strategy, trained)
    near = {"rel": 1e-6, "abs": 1e-6} if strategy == "ddp" else {"rel": 1e-4, "abs": 1e-5}
    for one in several:
        assert without_balance(one.metrics) == pytest.approx(without_balance(alone.metrics), **near)
        assert one.prepared == pytest.approx(alone.prepared, **near)
        for name, weight in alone.weights.items():
            torch.testing.assert_close(one.weights[name].double(), weight, rtol=0, atol=10 * near["abs"])
    assert several[0].metrics["balance/busiest_over_mean"] > alone.metrics["balance/busiest_over_mean"] == 1
    for name in ("log_probs_old", "entropy_old", "log_probs_reference", "advantages"):
        found = torch.cat([one.batch.columns[name] for one in several])
        torch.testing.assert_close(found, alone.batch.columns[name], rtol=1e-4, atol=1e-5)
    assert (alone.metrics["gradient_norm"] > 0.01) == (trained != 1) and alone.batch.log_probs_old.any()


def without_balance(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("balance/")}
