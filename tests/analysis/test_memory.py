"""The arithmetic of a plan: against bytes that tensors, optimizers and an engine really take, and how it must move."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer import tiny_run
from transformers import AutoConfig, AutoModelForCausalLM

from lightrft.analysis.live_bytes import LiveBytes
from lightrft.analysis.memory import Decoder, Phase, Role, Sampler, generating, phases, pushing
from lightrft.engines import TransformersEngine
from lightrft.lightning_modules import ActorModule
from lightrft.ops import fingerprint
from lightrft.samples import Prompt, Sampling
from lightrft.strategies import FSDP2, Placement, make_fabric, placement_of, sharding_of

# Powers of two, which any number of ranks used here divides.
SIZES = {**tiny_run.QWEN2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and sums of the tiny run."""
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


def role(placement: Placement | None = None, **changed: Any) -> Role:
    sizes = {"parameters": 1000, "trained": 1000, "block": 200, "outside": 200, "weight_bytes": 4}
    optimizer = {"state_bytes": 8.0, "step_bytes": 4.0}
    terms = {"evaluating": {"activations": 10}, "training": {"activations": 100}}
    return Role(**{"name": "actor", "placement": placement or Placement(), **sizes, **optimizer, **terms, **changed})


def peak(*roles: Role) -> int:
    found = phases(roles, Sampler(), checkpoints=False, refills=False)
    return max(sum(phase.device.values()) for phase in found.values())


# --- live bytes -------------------------------------------------------------------------------------------------------


def test_live_bytes_counts_a_storage_once_and_while_it_lives() -> None:
    before = torch.zeros(1000)
    with LiveBytes([before]) as live:
        first = torch.zeros(100)
        view, before_view = first[10:].t(), before[:10]
        assert live.now == {"tensors": 400}
        del first
        assert live.now == {"tensors": 400}
        second = view + 1
        del view
        assert live.now == {"tensors": 360} and live.peak == {"tensors": 760}
    assert before_view is not None and second is not None


def test_live_bytes_moves_between_names() -> None:
    with LiveBytes(name=lambda operation, arguments, result: str(result.ndim)) as live:
        vector, matrix = torch.zeros(4), torch.zeros(2, 2)
        live.rename(vector, "kept")
        assert live.now == {"1": 0, "2": 16, "kept": 16}
        del vector, matrix
        assert live.now == {"1": 0, "2": 0, "kept": 0}


# --- against what is really taken -------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [2**21, 2**25])
def test_a_fingerprints_memory_is_what_pushing_says(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of_fingerprints = importlib.import_module("lightrft.ops.fingerprint")
    monkeypatch.setattr(of_fingerprints, "_CPU_CHUNK", of_fingerprints._CHUNK)  # the plan is of a GPU
    tensor = torch.zeros(elements)
    fingerprint(tensor)  # its small tables stay
    with LiveBytes([tensor]) as live:
        fingerprint(tensor)
    assert sum(live.peak.values()) == pytest.approx(pushing(elements, 0), rel=0.01)


@pytest.mark.parametrize(("prompt_tokens", "samples"), [(8, 4), (128, 1)], ids=["sampling", "reading"])
@pytest.mark.parametrize("vocabulary", [64, 4096])
def test_an_engines_peak_is_what_generating_says(
    inputs: Path, prompt_tokens: int, samples: int, vocabulary: int
) -> None:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": vocabulary, "intermediate_size": 2048}
    config = AutoConfig.for_model(**{**SIZES, **sizes, "max_position_embeddings": 512})
    config.dtype = torch.float32
    actor = tiny_run.actor(inputs)
    engine, new = TransformersEngine(), 64
    engine.start(config, actor.tokenizer, torch.device("cpu"))
    engine.update_weights(AutoModelForCausalLM.from_config(config).state_dict().items(), 0)
    state = engine._model.state_dict(keep_vars=True)
    engine._stop_ids = frozenset()
    # Of different lengths, so that there is padding and with it a mask.
    prompts = [Prompt(str(n), torch.full((prompt_tokens - n,), 3), "", None, None) for n in range(4)]
    seeds = [[100 * n + k for k in range(samples)] for n in range(len(prompts))]
    with LiveBytes(state.values()) as live:
        engine.generate(prompts, Sampling(max_new_tokens=new, temperature=0.7), seeds)
    decoder = Decoder(3, 8, 1, 8, 64, 2048, vocabulary)
    alternatives = generating(decoder, 4 * samples, 4, prompt_tokens, new, 4, tempered=True)
    predicted = max(sum(terms.values()) for terms in alternatives)
    assert sum(live.peak.values()) == pytest.approx(predicted, rel=0.15)


def _bytes_on_a_rank(size: int, tokenizer: str) -> tuple[int, int]:
    """Of weights and optimizer state after a step under FSDP2."""
    fabric = make_fabric(FSDP2(), "32-true", accelerator="cpu", devices=size)
    fabric.launch()
    actor = ActorModule(config=SIZES, tokenizer=tokenizer)
    with torch.device("cpu"):
        actor.configure_model()
    sharding = sharding_of(fabric)
    module, optimizer = sharding.setup(actor, torch.optim.AdamW(actor.parameters()))
    ids = torch.arange(8)
    with sharding.accumulate(module, last=True):
        log_probs, _ = module(ids, ids, torch.tensor([0, 8], dtype=torch.int32), ids[:-1])
        sharding.backward(module, log_probs.sum())
    sharding.step(module, optimizer, None)
    held = [p.to_local() for p in actor.parameters()]
    states = [v.to_local() for s in optimizer.state.values() for v in s.values() if hasattr(v, "to_local")]
    return sum(t.nbytes for t in held), sum(t.nbytes for t in states)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_rests_on_each_rank_under_fsdp2_is_what_is_predicted(inputs: Path, size: int) -> None:
    found = ranks.on_ranks(size, _bytes_on_a_rank, size, str(inputs / "tokenizer"))
    actor = ActorModule(config=SIZES, tokenizer=str(inputs / "tokenizer"))
    with torch.device("meta"):
        actor.configure_model()
    parameters = sum(parameter.numel() for parameter in actor.parameters())
    placed = placement_of("fsdp2", size, "32-true")
    device, _ = role(placed, parameters=parameters, trained=parameters).resting()
    assert found == [(device["actor weights"], device["actor optimizer"])] * size


# --- how it must move -------------------------------------------------------------------------------------------------

STRATEGIES = ["fsdp2", "fsdp2_offload", "zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload"]
COUNTS = st.integers(1, 64)


@settings(deadline=None)  # the first of a strategy imports what runs it
@given(st.sampled_from(STRATEGIES), COUNTS, COUNTS, st.integers(1, 10**6), st.sampled_from(["32-true", "bf16-mixed"]))
def test_more_ranks_never_need_more(strategy: str, some: int, others: int, parameters: int, precision: str) -> None:
    few, many = sorted((some, others))
    sizes = {"parameters": parameters, "trained": parameters, "block": parameters // 3, "outside": parameters // 9}
    needs = [peak(role(placement_of(strategy, count, precision), **sizes)) for count in (few, many)]
    assert needs[1] <= needs[0]


@settings(deadline=None)  # the first of a strategy imports what runs it
@given(
    st.sampled_from(["fsdp2", "zero1", "zero2", "zero3"]),
    st.integers(1, 64),
    st.sampled_from(["32-true", "bf16-mixed"]),
)
def test_offloading_moves_to_the_host_and_never_needs_more(strategy: str, count: int, precision: str) -> None:
    kept, moved = (role(placement_of(name, count, precision)) for name in (strategy, f"{strategy}_offload"))
    assert peak(moved) <= peak(kept)
    assert sum(moved.resting()[1].values()) > 0 == sum(kept.resting()[1].values())
    assert sum(sum(part.values()) for part in moved.resting()) == sum(kept.resting()[0].values())


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 64))
def test_fewer_trained_parameters_never_need_more(trained: int, count: int) -> None:
    for strategy in ("ddp", "fsdp2", "zero2"):
        placed = placement_of(strategy, count, "bf16-mixed")
        assert peak(role(placed, trained=trained)) <= peak(role(placed))


def test_an_update_is_at_its_largest_in_a_micro_batch_or_in_the_step() -> None:
    small, large = role(training={"activations": 1}), role(training={"activations": 10**6})
    assert "actor optimizer's step" in small.update() and "actor activations" in large.update()
    alone = role(training={"activations": 10**6, "gradients": 7})
    assert alone.update()["actor gradients"] == 7 and large.update()["actor gradients"] == 4000


def test_an_engine_awake_is_there_in_every_phase_and_asleep_in_its_own_alone() -> None:
    def engine(asleep: Any) -> dict[str, Phase]:
        return phases([role()], Sampler(weights=500, asleep=asleep), checkpoints=False, refills=False)

    assert all("engine weights" in phase.device for phase in engine(None).values())
    for level in (1, 2):
        assert [name for name, phase in engine(level).items() if "engine weights" in phase.device] == ["rollout"]
    assert "engine weights" in engine(1)["score"].host and "engine weights" not in engine(2)["score"].host


def test_ddp_reduces_through_copies_where_there_are_ranks_to_reduce_over() -> None:
    one, two = (role(placement_of("ddp", count, "32-true")).resting()[0] for count in (1, 2))
    assert (one["actor reduction buckets"], two["actor reduction buckets"]) == (0, 4000)


def test_replicas_of_fsdp2_share_out_a_part_of_the_ranks() -> None:
    assert placement_of(FSDP2(replicas=2), 8, "32-true").weight_shards == 4
    with pytest.raises(ValueError, match="cannot share 9 ranks"):
        placement_of(FSDP2(replicas=2), 9, "32-true")


def test_a_refill_samples_while_scoring() -> None:
    sampler = Sampler(weights=500, asleep=1, generating=[{"KV cache": 900}])
    plain, refilled = (phases([role()], sampler, checkpoints=False, refills=refills) for refills in (False, True))
    assert "KV cache" not in plain["score"].device and refilled["score"] == replace(refilled["rollout"])


def test_a_checkpoint_is_staged_in_host_memory() -> None:
    found = phases([role()], Sampler(), checkpoints=True, refills=False)
    assert found["iteration"].host["checkpoint"] == 4000 + 8000 and found["score"].host == {}
