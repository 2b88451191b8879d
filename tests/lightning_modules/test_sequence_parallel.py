"""On 1, 2 and 4 ranks that share a row: the outputs of actor and critic, and the sum of gradients, are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, config_of, packed_whole, sharpen
from on_slices import apart, check_slices, gradient, group_of, loss_of, outputs
from ranks import on_ranks
from torch import Tensor
from trainer import tiny_run

from lightrft.lightning_modules import ActorModule, CriticModule, LoRA, pretrained
from lightrft.lightning_modules.backbone import LanguageBackbone
from lightrft.ops import Packed
from lightrft.strategies import Layout, gathered, make_fabric, sharding_of, whole

RANKS = 4
FOUR_HEADS = {"num_attention_heads": 4}
# (sequence lengths, positions that predict): 19 tokens are no multiple of 2 or 4, and one sequence is short of a slice.
ROWS: dict[str, tuple[tuple[int, ...], slice]] = {
    "all": ((6, 2, 11), slice(None)),
    "even": ((5, 3, 8), slice(None)),
    "on one rank": ((6, 2, 11), slice(-2, None)),
    "nowhere": ((6, 2, 11), slice(0)),
    "fewer tokens than ranks": ((3,), slice(None)),
    "in any order": ((6, 2, 11), slice(None)),
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 2},
    "sliding": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.write_inputs(tmp_path_factory.mktemp("sequence_parallel")) / "tokenizer")


def build(kind: type[LanguageBackbone], config: dict[str, Any], tokenizer: str, **options: Any) -> Any:
    """The same weights on every rank; float64, but for experts, whose kernels know it not."""
    torch.manual_seed(0)
    given = {"tokenizer": tokenizer} if kind is ActorModule else {}
    module = kind(config=config, **given, **options)
    module.configure_model()
    sharpen(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name or name.startswith("head."):  # 0 at the start
                parameter.normal_(std=0.3)
    return module if "moe" in config["model_type"] or "deepseek" in config["model_type"] else module.double()


def packed_row(name: str) -> Packed:
    lengths, predicting = ROWS[name]
    generator = torch.Generator().manual_seed(2)
    packed = packed_whole([torch.randint(2, 14, (length,), generator=generator) for length in lengths])
    packed.predict = packed.predict[predicting]
    if name == "in any order":
        packed.predict = packed.predict[torch.randperm(len(packed.predict), generator=generator)]
    return packed


def qwen2(name: str) -> dict[str, Any]:
    return {**config_of("qwen2"), **FOUR_HEADS, **MODELS[name]}


# --- one thing a test -------------------------------------------------------------------------------------------------


def every_model_and_row(tokenizer: str) -> None:
    dist.init_process_group("gloo")
    for name in MODELS:
        module = build(ActorModule, qwen2(name), tokenizer)
        for row in ROWS:
            check_slices(module, packed_row(row), (1, 2, 4), temperature=0.7)
    module = build(CriticModule, qwen2("untied"), tokenizer)
    for row in ROWS:
        check_slices(module, packed_row(row), (1, 2, 4))


def test_every_model_and_row(tokenizer: str) -> None:
    on_ranks(RANKS, every_model_and_row, tokenizer)


def every_family(tokenizer: str) -> None:
    dist.init_process_group("gloo")
    for family in FAMILIES:
        module = build(ActorModule, config_of(family), tokenizer)
        exact = next(module.parameters()).dtype == torch.float64
        check_slices(
            module, packed_row("all"), (2,), *((1e-7, 1e-5) if exact else (1e-4, 1e-3))
        )  # some work in float32 inside


def test_every_family_that_can_be_packed(tokenizer: str) -> None:
    on_ranks(2, every_family, tokenizer)


def memory_savers(tokenizer: str) -> None:
    dist.init_process_group("gloo")
    module = build(ActorModule, qwen2("tied"), tokenizer, gradient_checkpointing=True).train()
    check_slices(module, packed_row("all"), (2, 4))
    check_slices(module, packed_row("on one rank"), (4,))
    module.head_chunk_tokens = 2  # ranks have different numbers of chunks
    check_slices(module, packed_row("all"), (4,))
    module = build(CriticModule, qwen2("tied"), tokenizer, gradient_checkpointing=True).train()
    check_slices(module, packed_row("all"), (4,))


def test_gradient_checkpointing_and_the_chunked_head(tokenizer: str) -> None:
    on_ranks(RANKS, memory_savers, tokenizer)


def adapters(tokenizer: str) -> None:
    dist.init_process_group("gloo")
    for target in ("all-linear", ["v_proj"]):  # the second gives queries and keys of the first layer no gradient
        module = build(ActorModule, qwen2("untied"), tokenizer, lora=LoRA(rank=2, target_modules=target))
        check_slices(module, packed_row("all"), (2, 4))
        check_slices(module, packed_row("nowhere"), (4,))
        group = group_of(4)
        with torch.no_grad():
            whole = outputs(module, packed_row("all"), adapter=False)
            module.shard_sequences(group)
            found = outputs(module, packed_row("all"), adapter=False)
        assert apart(found[0], outputs(module, packed_row("all"))[0]) > 1e-3
        torch.testing.assert_close(found, whole)
    module = build(CriticModule, qwen2("untied"), tokenizer, lora=LoRA(rank=2))
    check_slices(module, packed_row("all"), (4,))


def test_lora_and_the_reference_with_its_adapter_off(tokenizer: str) -> None:
    on_ranks(RANKS, adapters, tokenizer)


def half_precision(tokenizer: str) -> None:
    dist.init_process_group("gloo")
    for kind in (ActorModule, CriticModule):
        for family in ("qwen2", "qwen3"):  # queries and keys leave Qwen3's norms in float32
            module = build(kind, config_of(family) | FOUR_HEADS, tokenizer).float()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                check_slices(module, packed_row("all"), (2, 4), 2e-2, 2e-2)


def test_bfloat16_autocast(tokenizer: str) -> None:
    on_ranks(RANKS, half_precision, tokenizer)


# --- placed by a strategy ---------------------------------------------------------------------------------------------


def step_as_in_a_run(strategy: str, second_row: str, tokenizer: str) -> list[tuple[float, float]]:
    """Two groups of two ranks, each with a row of its own: one step, against the gradient of both rows on one rank."""
    fabric = make_fabric(strategy, "32-true", accelerator="cpu", devices=RANKS)
    fabric.launch()
    sharding, mesh = sharding_of(fabric), Layout(RANKS, fabric.global_rank, 2).mesh("cpu")
    rows, moved = ["all", second_row], []
    for kind in (ActorModule, CriticModule):
        alone = build(kind, qwen2("tied"), tokenizer).float()
        expected = sum(gradient(alone, loss_of(outputs(alone, packed_row(row)))) for row in rows)
        before = whole_weights(alone)
        with sharding.building():
            module = build(kind, qwen2("tied"), tokenizer, gradient_checkpointing=True).float()
        module.shard_sequences(mesh.get_group("sequence"))
        if strategy != "zero3":  # gathers the head for each chunk: as many are needed on every rank, shared row or not
            module.head_chunk_tokens = 2
        optimizer = torch.optim.SGD(module.parameters(), lr=1 / float(expected.norm()))
        placed, optimizer = sharding.setup(module.train(), optimizer)
        with sharding.accumulate(placed, last=True):
            loss = loss_of(outputs(placed, packed_row(rows[mesh.get_local_rank("data")])))
            sharding.backward(placed, loss * RANKS)  # strategies average over all ranks
        norm = sharding.step(placed, optimizer, None)
        step = before - whole_weights(module)
        moved.append((norm / float(expected.norm()), apart(step, expected / expected.norm())))
    return moved


def whole_weights(module: LanguageBackbone) -> Tensor:
    """In the order of ``parameters()``."""
    head = [*module.head.parameters()] if isinstance(module, CriticModule) else []
    with gathered(head):
        weights = [whole(parameter) for parameter in head]
    weights += [weight for _, weight in pretrained.exported_weights(module.transformer)]
    return torch.cat([weight.flatten() for weight in weights])


@pytest.mark.parametrize(
    ("strategy", "second_row"),
    [("ddp", "nowhere"), ("fsdp2", "on one rank"), ("fsdp2", "nowhere"), ("zero1", "nowhere"), ("zero3", "nowhere")],
)
def test_a_step_under_a_strategy_is_that_of_one_rank_with_all_rows(
    tokenizer: str, strategy: str, second_row: str
) -> None:
    for norm, off in on_ranks(RANKS, step_as_in_a_run, strategy, second_row, tokenizer)[0]:
        assert norm == pytest.approx(1, rel=1e-4) and off < 1e-4


# --- the module around it ---------------------------------------------------------------------------------------------


def copies_and_weights(tokenizer: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    group = group_of(2)
    actor, packed = build(ActorModule, qwen2("tied"), tokenizer), packed_row("all")
    before = {name: weight.clone() for name, weight in actor.export_parameters()}
    whole = outputs(actor, packed)
    early = actor.frozen_copy()
    actor.shard_sequences(group)
    late = actor.frozen_copy()
    early.shard_sequences(group)
    seen: list[int] = []
    for reference in (early, late):
        reference.transformer.get_decoder().norm.register_forward_hook(
            lambda module, args, out: seen.append(len(out[0]))
        )
        torch.testing.assert_close(outputs(reference, packed), whole)
    assert seen == [10, 10]  # of 19 tokens
    late.shard_sequences(None)
    torch.testing.assert_close(outputs(late, packed), whole)  # alone, and the others still together
    torch.testing.assert_close(outputs(actor, packed), whole)
    assert seen == [10, 10, 19]
    after = dict(actor.export_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if dist.get_rank() == 0:
        actor.save_pretrained(folder)


def test_copies_share_out_too_and_what_is_written_is_as_before(tokenizer: str, tmp_path: Path) -> None:
    on_ranks(2, copies_and_weights, tokenizer, tmp_path)
    again = ActorModule(model=str(tmp_path))
    again.configure_model()
    before = build(ActorModule, qwen2("tied"), tokenizer).float()
    torch.testing.assert_close(outputs(again, packed_row("all")), outputs(before, packed_row("all")))


def the_heads_work(tokenizer: str) -> list[list[int]]:
    dist.init_process_group("gloo")
    group = group_of(4)
    actor, seen = build(ActorModule, qwen2("untied"), tokenizer), []
    actor.shard_sequences(group)
    head = actor.transformer.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    for row in ("all", "on one rank"):
        outputs(actor, packed_row(row))
    return seen


def test_each_rank_computes_the_logits_of_its_own_predictions(tokenizer: str) -> None:
    # Slices of 5: tokens 0-4, 5-9, 10-14, 15-18; the last tokens of the sequences (5, 7, 18) predict nothing.
    assert on_ranks(RANKS, the_heads_work, tokenizer) == [[5, 0], [3, 0], [5, 0], [3, 2]]


def refusals(tokenizer: str) -> list[str]:
    dist.init_process_group("gloo")
    group = group_of(4)
    said = []
    padded = build(CriticModule, qwen2("tied"), tokenizer, packing=False)
    two_heads = build(ActorModule, config_of("qwen2"), tokenizer)
    packed = packed_row("all")
    strange = build(ActorModule, qwen2("tied"), tokenizer)
    strange.shard_sequences(group)
    decoder, row = strange.transformer.get_decoder(), packed.input_ids[None]
    known = {"position_ids": packed.position_ids[None], "cu_seq_lens_q": packed.cu_seqlens}
    for refused in (
        lambda: padded.shard_sequences(group),
        lambda: two_heads.shard_sequences(group),
        lambda: decoder(input_ids=row, per_layer_inputs=[row], **known),
        lambda: decoder(row, **known),
        lambda: decoder(input_ids=row, cu_seq_lens_q=packed.cu_seqlens),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        said.append(str(error.value))
    torch.testing.assert_close(outputs(two_heads, packed)[0].shape, packed.predict.shape)  # as whole as before
    return said


def test_what_cannot_be_shared_out_is_refused_with_what_to_set(tokenizer: str) -> None:
    padded, heads, strange, positional, missing = on_ranks(RANKS, refusals, tokenizer)[0]
    assert "the critic pads" in padded and "packing: true" in padded
    assert "2 attention heads" in heads and "4 ranks" in heads and "sequence_parallel_size" in heads
    assert "per_layer_inputs" in strange and "sequence_parallel_size: 1" in strange
    assert "by keywords" in positional and "position_ids" in missing
