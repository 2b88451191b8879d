"""A critic's packed values are those of each sequence alone and of what came before; they start at 0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, PADDED_FAMILIES, config_of, packed_whole, sequences, sharpen
from torch import Tensor
from trainer import tiny_run
from transformers import AutoModelForCausalLM

from lightrft.lightning_modules import CriticModule, LoRA

# Experts' kernels know no float64.
DENSE = ["qwen2", "qwen2-sliding", "qwen3", "llama", "gemma3_text", "gpt2"]


def build(config: dict[str, Any], **options: Any) -> CriticModule:
    """A configured critic with the same weights for the same configuration, float64; its head drawn, not 0."""
    torch.manual_seed(0)
    critic = CriticModule(config=config, **options)
    critic.configure_model()
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(critic.head.bias, 0.5)
    return critic.double()


def run(critic: CriticModule, rows: list[Tensor]) -> Tensor:
    """Values before tokens 1.. of each sequence, one after the other, of one forward."""
    packed = packed_whole(rows)
    return critic(*packed.inputs)


def one_by_one(critic: CriticModule, rows: list[Tensor]) -> Tensor:
    return torch.cat([run(critic, [row]) for row in rows])


def plain(critic: CriticModule, rows: list[Tensor]) -> Tensor:
    """The same from the model's own forward of each sequence alone, and the head as an equation."""
    model = critic.transformer
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hidden = torch.cat([model(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1] for row in rows])
    model.set_attn_implementation(used)
    return (hidden * critic.head.weight[0]).sum(-1) + critic.head.bias


def gradient(critic: CriticModule, values: Tensor) -> Tensor:
    """Of a loss in which every value pulls differently."""
    wanted = torch.linspace(-1, 1, len(values), dtype=values.dtype)
    parameters = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad((values - wanted).square().sum(), parameters, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


def bits(critic: CriticModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in critic.state_dict().items()}


def written(folder: Path, family: str) -> tuple[Path, Any]:
    """A folder with a causal language model, and the model."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(build(config_of(family)).transformer.config))
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("family", DENSE)
def test_packed_equals_padded_equals_one_by_one(family: str) -> None:
    packed, padded = build(config_of(family)), build(config_of(family), packing=False)
    rows = sequences()
    together = run(packed, rows)
    assert len(together) == sum(len(row) - 1 for row in rows) and float(together.detach().std()) > 0.1
    expected = gradient(packed, together)
    for critic, way in ((padded, run), (packed, one_by_one), (padded, one_by_one)):
        values = way(critic, rows)
        torch.testing.assert_close(values, together, rtol=1e-10, atol=1e-10)
        # Gemma's norm works in float32 inside, which can round the same number either way.
        assert apart(gradient(critic, values), expected) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_forward_one_by_one(family: str) -> None:
    check_against_plain(build(config_of(family)))


@pytest.mark.parametrize("family", [*PADDED_FAMILIES, "xglm"])
def test_an_architecture_that_cannot_be_packed_is_refused_and_runs_padded(family: str) -> None:
    critic = CriticModule(config=config_of(family))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^\w+ .*; set packing: false on the critic\.$"):
            critic.configure_model()
    check_against_plain(build(config_of(family), packing=False))


def check_against_plain(critic: CriticModule) -> None:
    sharpen(critic)
    ours, theirs = run(critic, sequences()), plain(critic, sequences())
    assert apart(ours, theirs) < 1e-5
    assert apart(gradient(critic, ours), gradient(critic, theirs)) < 1e-4


def test_a_leak_is_named_by_what_differs() -> None:
    with pytest.raises(ValueError, match=r"^XGLM\w+ gives other hidden states in our forward than in its own \(by "):
        build(config_of("xglm"))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", DENSE)
def test_a_value_sees_every_token_before_it_and_none_after(family: str, packing: bool) -> None:
    critic, row = build(config_of(family), packing=packing), sequences()[2]
    values, reach = run(critic, [row]), 3 if "sliding" in family or "gemma" in family else len(row)
    for at in range(1, len(row)):
        changed = row.clone()
        changed[at] = 2 + (row[at] - 1) % 12
        moved = (run(critic, [changed]) - values).abs() > 1e-9
        # values[i] is that of the state whose last token is i.
        assert not bool(moved[:at].any()) and bool(moved[at : at + reach].all())


def test_values_are_0_at_the_start_and_the_first_step_moves_them() -> None:
    critic = CriticModule(config=config_of("qwen2"), optimizer=lambda params: torch.optim.SGD(params, lr=0.01))
    critic.configure_model()
    optimizer, rows = critic.configure_optimizers(), sequences()
    distances = []
    for _ in range(3):
        values = run(critic, rows)
        loss = (values - 1).square().mean()
        distances.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distances[0] == 1 and distances[2] < distances[1] < 0.95


@pytest.mark.parametrize("place", ["autocast", "weights"])
def test_values_are_float32_where_the_layers_are_bfloat16(place: str) -> None:
    critic, rows = build(config_of("qwen2")).float(), sequences()
    seen = []
    critic.head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=place == "autocast"):
        values = run(critic if place == "autocast" else critic.bfloat16(), rows)
    expected = seen[0].double() @ critic.head.weight[0].double() + critic.head.bias.double()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert float((values - values.bfloat16()).detach().abs().max()) > 1e-4  # rounding would have shown
    values.sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_the_layers_are_the_language_models_without_its_head(tmp_path: Path, family: str) -> None:
    folder, model = written(tmp_path, family)
    critic = CriticModule(str(folder))
    critic.configure_model()
    body = {f"language_model.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    found = bits(critic)
    assert found.keys() == body.keys() | {"head.weight", "head.bias"}
    assert all(torch.equal(found[name], tensor) for name, tensor in body.items())
    assert found["head.weight"].shape == (1, 32) and not any(found[name].any() for name in ("head.weight", "head.bias"))


def test_the_head_is_as_wide_as_what_the_language_models_head_took() -> None:
    # OPT projects its hidden states down before the head.
    config = {**config_of("opt"), "ffn_dim": 64, "word_embed_proj_dim": 16}
    critic = build(config)
    assert critic.head.weight.shape == (1, 16)
    check_against_plain(critic)


def test_weights_by_name_do_not_depend_on_the_seed_nor_draw_from_it(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "qwen2")
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        critic = CriticModule(str(folder))
        critic.configure_model()
        assert torch.equal(torch.get_rng_state(), before)
        found.append(bits(critic))
    assert tiny_run.differences(*found) == []


def test_configuring_twice_changes_nothing() -> None:
    critic = build(config_of("qwen2"))
    before, model, head = bits(critic), critic.language_model, critic.head
    critic.configure_model()
    assert critic.language_model is model and critic.head is head
    assert tiny_run.differences(bits(critic), before) == []


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_a_saved_state_brings_its_values_back(tmp_path: Path, lora: LoRA | None) -> None:
    critic = build(config_of("qwen2"), lora=lora)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(critic.state_dict(), tmp_path / "state.pt")
    other = build(config_of("qwen2"), lora=lora)
    assert apart(run(other, sequences()), run(critic, sequences())) > 1e-2
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(run(other, sequences()), run(critic, sequences()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"packing": False}, {"gradient_checkpointing": True}])
def test_the_gradient_does_not_depend_on_how_memory_is_saved(options: dict[str, Any]) -> None:
    def found(**options: Any) -> Tensor:
        critic = build(config_of("qwen2"), **options).train()
        return gradient(critic, run(critic, sequences()))

    assert apart(found(**options), found()) < 1e-10


def test_training_has_no_dropout() -> None:
    dropout = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
    critic = build({**config_of("gpt2"), **dropout}, packing=False)
    evaluated, trained = (run(mode, sequences()) for mode in (critic.eval(), critic.train()))
    torch.testing.assert_close(trained, evaluated, rtol=1e-12, atol=1e-12)


def test_an_empty_micro_batch_runs_forward_and_backward() -> None:
    critic, row = build(config_of("qwen2")), sequences()[0]
    nothing = torch.zeros(0, dtype=torch.int64)
    ends = torch.tensor([0, len(row)], dtype=torch.int32)
    values = critic(row, torch.arange(len(row)), ends, nothing)
    assert values.shape == (0,)
    values.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in critic.parameters())


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "named"])
def test_lora_trains_its_adapters_and_the_head(target: Any) -> None:
    whole = build(config_of("qwen2"))
    critic = build(config_of("qwen2"), lora=LoRA(rank=4, alpha=8.0, target_modules=target))
    torch.testing.assert_close(run(critic, sequences()), run(whole, sequences()), rtol=0, atol=0)
    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert {"head.weight", "head.bias"} < trained
    assert all("lora_" in name for name in trained - {"head.weight", "head.bias"})
    before = bits(critic)
    optimizer = critic.configure_optimizers()
    for _ in range(2):  # lora_A has a gradient once lora_B is not 0
        (run(critic, sequences()) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(tiny_run.differences(bits(critic), before)) == {f"/{name}" for name in trained}


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_the_optimizer_sees_what_trains_and_nothing_else(lora: LoRA | None) -> None:
    critic = build(config_of("qwen2"), lora=lora, lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1))
    configured = critic.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    wanted = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in wanted]
    assert configured["lr_scheduler"]["interval"] == "step" and group["initial_lr"] == 1e-5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "Give the critic either model .* or config"),
        ({"model": "a", "config": {"model_type": "qwen2"}}, "Give the critic either model .* or config"),
        ({"model": "a", "value_clip": -0.1}, r"value_clip is -0\.1"),
        ({"model": "a", "value_clip": float("nan")}, "value_clip is nan"),
        ({"model": "a", "warmup_iterations": -1}, "warmup_iterations is -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CriticModule(**options)


def test_bounds_of_the_options_are_allowed() -> None:
    critic = CriticModule("a", value_clip=0.0, warmup_iterations=0)
    assert (critic.value_clip, critic.warmup_iterations) == (0.0, 0)


def test_what_does_not_load_is_named(tmp_path: Path) -> None:
    critic = CriticModule(str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match=r"The critic has no weights yet; configure_model\(\) loads them\."):
        _ = critic.transformer
    with pytest.raises(ValueError, match=r"model .*nowhere"):
        critic.configure_model()
