"""What is counted on fake tensors is what the same forward and backward take with real ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer import tiny_run

from lightrft.analysis.live_bytes import LiveBytes
from lightrft.lightning_modules import ActorModule, CriticModule
from lightrft.lightning_modules.backbone import LanguageBackbone
from lightrft.lightning_modules.footprint import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    WEIGHT_COPIES,
    Footprint,
    MicroBatch,
    optimizer_bytes,
    weights_of,
    without_weights,
)
from lightrft.lightning_modules.pretrained import LoRA

SIZES = {**tiny_run.QWEN2, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 500}
BATCH = MicroBatch(sequences=4, length=32, predictions=20)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": LoRA(rank=4)},
    "untied": {"config": {**SIZES, "tie_word_embeddings": False}},
    "gemma": {"config": {**SIZES, "model_type": "gemma", "head_dim": 16}},
    "qwen3": {"config": {**SIZES, "model_type": "qwen3", "head_dim": 16}},
    "padded": {"packing": False},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_run.write_inputs(tmp_path_factory.mktemp("inputs")) / "tokenizer")


def actor(tokenizer: str, **options: Any) -> ActorModule:
    return ActorModule(**{"config": SIZES, "tokenizer": tokenizer, **options})


def inputs() -> tuple[torch.Tensor, ...]:
    starts = torch.arange(0, BATCH.tokens + 1, BATCH.length, dtype=torch.int32)
    positions = torch.arange(BATCH.length).repeat(BATCH.sequences)
    predict = (torch.arange(BATCH.predictions) + starts[:-1, None]).flatten().long()
    return positions % 7, positions, starts, predict


def counted(module: LanguageBackbone, dtype: torch.dtype = torch.float32, mixed: Any = None) -> Footprint:
    twin = copy.deepcopy(module)
    without_weights(twin)
    return Footprint(twin, dtype, mixed)


def taken(module: LanguageBackbone, mixed: Any, train: bool, keep: bool = True) -> int:
    """Bytes of a real forward, and a backward, at their most."""
    module.configure_model()
    module.train(train)
    if not keep:
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    arguments = inputs()
    with torch.set_grad_enabled(train), LiveBytes([*module.parameters(), *module.buffers(), *arguments]) as live:
        with torch.autocast("cpu", dtype=mixed or torch.bfloat16, enabled=mixed is not None):
            found = module(*arguments)
        outputs = found if isinstance(found, tuple) else (found,)
        loss = torch.stack([output.sum() for output in outputs]).sum()
        del found, outputs
        if train:
            loss.backward()
    return sum(live.peak.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_takes_what_is_counted(tokenizer: str, variant: str) -> None:
    footprint = counted(actor(tokenizer, **VARIANTS[variant]))
    for train, found in ((True, footprint.train(BATCH, True)), (False, footprint.evaluate(BATCH))):
        real = taken(actor(tokenizer, **VARIANTS[variant]), None, train)
        assert sum(found.values()) == pytest.approx(real, rel=0.02), train


@pytest.mark.parametrize("variant", [{}, {"gradient_checkpointing": True}, {"lora": LoRA(rank=4)}], ids=str)
def test_mixed_precision_takes_what_is_counted(tokenizer: str, variant: dict[str, Any]) -> None:
    # Padded, for the CPU has no variable-length kernel; the rest of the model is the same.
    options = {**variant, "packing": False}
    footprint = counted(actor(tokenizer, **options), mixed=torch.bfloat16)
    for train, found in ((True, footprint.train(BATCH, True)), (False, footprint.evaluate(BATCH))):
        real = taken(actor(tokenizer, **options), torch.bfloat16, train)
        assert sum(found.values()) == pytest.approx(real, rel=0.03), train


def test_the_critic_takes_what_is_counted() -> None:
    found = counted(CriticModule(config=SIZES)).train(BATCH, True)
    assert sum(found.values()) == pytest.approx(taken(CriticModule(config=SIZES), None, True), rel=0.02)
    assert LOGITS not in found


def test_gradients_freed_as_they_come_are_not_counted(tokenizer: str) -> None:
    found = counted(actor(tokenizer)).train(BATCH, False)
    assert GRADIENTS not in found
    assert sum(found.values()) == pytest.approx(taken(actor(tokenizer), None, True, keep=False), rel=0.02)


def test_gradients_that_are_kept_are_named_even_where_the_peak_is_before_them(tokenizer: str) -> None:
    module = actor(tokenizer, config={**SIZES, "vocab_size": 20000}, gradient_checkpointing=True)
    found = counted(module).train(BATCH, True)
    assert found[GRADIENTS] == 0 and found[LOGITS] > found[ACTIVATIONS]


def test_terms_are_named_by_what_they_are(tokenizer: str) -> None:
    module = actor(tokenizer)
    footprint = counted(module, mixed=torch.bfloat16)
    evaluated, frozen = footprint.evaluate(BATCH), footprint.evaluate(BATCH, frozen=True)
    module.configure_model()
    linear = sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))
    assert evaluated[WEIGHT_COPIES] > 2 * linear  # and biases
    assert frozen.get(WEIGHT_COPIES, 0) < 2 * linear / 2
    assert evaluated[LOGITS] == 4 * 4 * BATCH.sequences * BATCH.predictions * 500
    assert counted(module).evaluate(BATCH).get(WEIGHT_COPIES, 0) == 0


def test_attention_in_half_precision_is_the_kernels(tokenizer: str) -> None:
    """Which holds neither rectangles nor scores: activations grow with tokens, however they are cut into sequences."""
    footprint = counted(actor(tokenizer), mixed=torch.bfloat16)
    cut = [footprint.train(MicroBatch(n, 512 // n, 256 // n), False)[ACTIVATIONS] for n in (1, 8)]
    assert cut[0] == pytest.approx(cut[1], rel=0.001)
    padded = counted(actor(tokenizer, packing=False), mixed=torch.bfloat16)
    assert footprint.train(BATCH, False)[ACTIVATIONS] < padded.train(BATCH, False)[ACTIVATIONS]


def test_a_footprint_needs_no_memory(tokenizer: str) -> None:
    """A model of 33 B parameters, on a machine that has not that much."""
    sizes = {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 16, "num_attention_heads": 64}
    module = actor(tokenizer, config={**SIZES, **sizes, "num_key_value_heads": 8})
    without_weights(module)
    weights = weights_of(module)
    assert weights.all > 25e9 and weights.block == pytest.approx(weights.all / 16, rel=0.01)
    assert sum(Footprint(module, torch.bfloat16).evaluate(BATCH).values()) > 0


def test_of_a_named_model_the_configuration_alone_is_read(tokenizer: str, tmp_path: Path) -> None:
    module = actor(tokenizer)
    module.configure_model()
    module.transformer.config.save_pretrained(tmp_path)
    named = ActorModule(model=str(tmp_path), tokenizer=tokenizer)
    without_weights(named)
    assert weights_of(named).all == sum(parameter.numel() for parameter in module.parameters())
    missing = ActorModule(model=str(tmp_path / "no"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no model folder"):
        without_weights(missing)


@pytest.mark.parametrize(
    ("optimizer", "state", "step"),
    [
        (lambda params: torch.optim.AdamW(params), 8, 4),
        (lambda params: torch.optim.AdamW(params, amsgrad=True), 12, 4),
        (lambda params: torch.optim.SGD(params, lr=0.1), 0, 0),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), 4, 0),
    ],
    ids=["adamw", "amsgrad", "sgd", "momentum"],
)
def test_an_optimizers_bytes_are_those_of_its_state(optimizer: Any, state: int, step: int) -> None:
    assert optimizer_bytes(optimizer, torch.float32) == (state, pytest.approx(step, abs=0.01))
    assert optimizer_bytes(optimizer, torch.bfloat16) == (state / 2, pytest.approx(step / 2, abs=0.01))


def test_a_forward_that_asks_for_values_is_refused(tokenizer: str) -> None:
    class Deciding(ActorModule):
        def forward(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward(input_ids[: int(input_ids.max()) + 1], *args, **kwargs)

    module = Deciding(config=SIZES, tokenizer=tokenizer)
    without_weights(module)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM decides by values"):
        Footprint(module, torch.float32).evaluate(BATCH)
