"""An actor's packed log-probs are those of the model's own forward, in every family; what it writes, others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, PADDED_FAMILIES, config_of, packed_whole, sequences, sharpen
from torch import Tensor
from trainer import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft.lightning_modules import ActorModule, LoRA


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_inputs(tmp_path_factory.mktemp("actor"))


def build(inputs: Path, config: dict[str, Any], **options: Any) -> ActorModule:
    """A configured actor with the same weights for the same configuration, float64."""
    torch.manual_seed(0)
    actor = ActorModule(config=config, tokenizer=str(inputs / "tokenizer"), **options)
    actor.configure_model()
    return actor.double()


def run(actor: ActorModule, rows: list[Tensor], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of tokens 1.. of each sequence."""
    packed = packed_whole(rows)
    log_probs, entropy = actor(*packed.inputs, **options)
    sizes = [len(row) - 1 for row in rows]
    return list(log_probs.split(sizes)), list(entropy.split(sizes))


def plain(actor: ActorModule, row: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same from the model's own forward of the sequence alone."""
    model = actor.transformer
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=row[None], use_cache=False).logits[0, :-1] / temperature
    model.set_attn_implementation(used)
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, row[1:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def check_against_plain(actor: ActorModule) -> None:
    """Value and gradient of log-probs and entropy of all sequences, against those of each alone by the model itself."""
    rows = sequences()
    parameters = [parameter for parameter in actor.parameters() if parameter.requires_grad]

    def gradient(log_probs: Tensor, entropy: Tensor) -> Tensor:
        loss = log_probs.sum() + 0.3 * (entropy * entropy.detach()).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    ours = [torch.cat(parts) for parts in run(actor, rows, temperature=0.7)]
    theirs = [torch.cat(parts) for parts in zip(*(plain(actor, row, temperature=0.7) for row in rows))]
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    expected = gradient(*theirs)
    assert float((gradient(*ours) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_forward_one_by_one(inputs: Path, family: str, packing: bool) -> None:
    check_against_plain(sharpen(build(inputs, config_of(family), packing=packing)))


@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_an_architecture_that_cannot_be_packed_is_refused_and_runs_padded(inputs: Path, family: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+ .*; set packing: false on the actor\.$"):
        build(inputs, config_of(family))
    check_against_plain(sharpen(build(inputs, config_of(family), packing=False)))


def test_a_refused_actor_is_refused_again(inputs: Path) -> None:
    actor = ActorModule(config=config_of("gemma2"), tokenizer=str(inputs / "tokenizer"))
    for _ in range(2):
        with pytest.raises(ValueError, match="packing: false"):
            actor.configure_model()


def test_a_leak_that_fresh_weights_hardly_show_is_refused(inputs: Path) -> None:
    with pytest.raises(ValueError, match=r"gives other log-probs .*packing: false"):
        build(inputs, config_of("xglm"))
    check_against_plain(sharpen(build(inputs, config_of("xglm"), packing=False)))


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("gpt2", {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}),
        ("qwen2", {"attention_dropout": 0.5}),
        ("bloom", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
def test_training_has_no_dropout(inputs: Path, family: str, dropout: dict[str, Any]) -> None:
    actor = build(inputs, {**config_of(family), **dropout}, packing=False)
    evaluated, trained = (torch.cat(run(mode, sequences())[0]) for mode in (actor.eval(), actor.train()))
    torch.testing.assert_close(trained, evaluated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"packing": False}, {"gradient_checkpointing": True}])
def test_the_gradient_does_not_depend_on_how_memory_is_saved(inputs: Path, options: dict[str, Any]) -> None:
    def gradient(actor: ActorModule) -> Tensor:
        log_probs, entropies = run(actor.train(), sequences())
        (torch.cat(log_probs).sum() + 0.3 * torch.cat(entropies).sum()).backward()
        return torch.cat([p.grad.flatten() for p in actor.parameters()])

    reference = gradient(build(inputs, tiny_run.QWEN2))
    other = gradient(build(inputs, tiny_run.QWEN2, **options))
    assert float((other - reference).norm() / reference.norm()) < 1e-10


@pytest.mark.parametrize("size", [1, 4, 1024])
def test_the_head_holds_the_logits_of_one_chunk_at_a_time(inputs: Path, size: int) -> None:
    actor, rows = build(inputs, tiny_run.QWEN2), sequences()
    whole = torch.cat(run(actor, rows)[0])
    assert ActorModule.head_chunk_tokens == 1024
    actor.head_chunk_tokens, seen = size, []
    head = actor.transformer.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    torch.testing.assert_close(torch.cat(run(actor, rows)[0]), whole, rtol=1e-12, atol=1e-12)
    assert sum(seen) == len(whole) and max(seen) == min(size, len(whole))


def with_adapter(inputs: Path) -> ActorModule:
    actor = build(inputs, tiny_run.QWEN2, lora=LoRA(rank=4, alpha=8.0))
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if "lora_B" in name:  # zero at the start, when the adapter does nothing
                parameter.normal_(std=0.3)
    return actor


def test_with_the_adapter_off_lora_is_the_base(inputs: Path) -> None:
    base, _ = run(build(inputs, tiny_run.QWEN2), sequences())
    actor = with_adapter(inputs)
    off, _ = run(actor, sequences(), adapter=False)
    on, _ = run(actor, sequences())
    torch.testing.assert_close(torch.cat(off), torch.cat(base), rtol=0, atol=0)
    assert float((torch.cat(on) - torch.cat(base)).abs().max()) > 1e-2
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in actor.named_parameters())


@pytest.mark.parametrize("family", ["qwen2", "llama", "lora"])
def test_a_written_folder_loads_elsewhere_with_the_same_log_probs(inputs: Path, tmp_path: Path, family: str) -> None:
    actor = with_adapter(inputs) if family == "lora" else build(inputs, config_of(family))
    actor.float().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) >= 14
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 1
    row = sequences()[2]
    log_p = loaded(input_ids=row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
    torch.testing.assert_close(run(actor, [row])[0][0], log_p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama", "lora"])
def test_exported_weights_have_the_plain_models_names_and_shapes(inputs: Path, family: str) -> None:
    config = config_of(family) if family != "lora" else tiny_run.QWEN2
    actor = with_adapter(inputs) if family == "lora" else build(inputs, config)
    plain_model = build(inputs, config).transformer
    exported = {name: tensor.shape for name, tensor in actor.export_parameters()}
    assert exported == {name: parameter.shape for name, parameter in plain_model.named_parameters()}


def test_the_reference_is_a_copy_that_training_does_not_move(inputs: Path) -> None:
    actor = build(inputs, tiny_run.QWEN2)
    reference = actor.frozen_copy()
    before = torch.cat(run(reference, sequences())[0])
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(torch.cat(run(reference, sequences())[0]), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either model .* or config"),
        ({"model": "a", "config": {"model_type": "qwen2"}}, "either model .* or config"),
        ({"config": {"model_type": "qwen2"}}, "needs a tokenizer"),
    ],
)
def test_an_actor_without_a_clear_origin_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ActorModule(**options)


def test_what_does_not_load_is_named(inputs: Path, tmp_path: Path) -> None:
    tokenizer = str(inputs / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer .*nowhere"):
        ActorModule(config=tiny_run.QWEN2, tokenizer=str(tmp_path / "nowhere")).configure_model()
    with pytest.raises(ValueError, match=r"model .*nowhere"):
        ActorModule(model=str(tmp_path / "nowhere"), tokenizer=tokenizer).configure_model()
    with pytest.raises(ValueError, match="no_such_type"):
        ActorModule(config={"model_type": "no_such_type"}, tokenizer=tokenizer).configure_model()
    with pytest.raises(ValueError, match="14 tokens but the model embeds only 9"):
        build(inputs, {**tiny_run.QWEN2, "vocab_size": 9})
