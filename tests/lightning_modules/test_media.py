"""Images and audio in actor and critic: packed, padded and one by one they are the model's own forward, which is given
what its processor makes of a whole prompt."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from media_worlds import MediaWorld, media_world
from torch import Tensor

from lightrft.lightning_modules import ActorModule, CriticModule, LoRA, media_inputs
from lightrft.media import MediaProcessor, placeholder_ids
from lightrft.ops import pack
from lightrft.samples import Prompt

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="its processor needs torchvision")
MROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES = ["llava", "qwen2_audio", *[pytest.param(name, marks=needs_torchvision) for name in (*MROPE, "internvl")]]
# Rotary angles are float32 in every family, the same ones for the same positions.
NEAR: dict[str, float] = {"rtol": 1e-9, "atol": 1e-9}
Module = ActorModule | CriticModule


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a family's model, with its processor."""

    def write(family: str) -> str:
        folder = tmp_path_factory.getbasetemp() / family
        if not folder.exists():
            media_world(family).model.save_pretrained(folder)
            media_world(family).processor.save_pretrained(folder)
        return str(folder)

    return write


def double(module: Module) -> Any:
    module.configure_model()
    return module.double().train()


def rows(world: MediaWorld) -> list[tuple[Prompt, Tensor]]:
    """Prompts with one, several and no media, of different sizes and lengths, and a response to each."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        world.prompt("one", [0]),
        world.prompt("several", [2, 1, 0], length=5),
        world.prompt("text", [], length=9),
        world.prompt("twice the same", [3, 3], length=4),
        world.prompt("large", [5], length=3),
    ]
    if "videos" in MediaProcessor(world.processor).kinds:
        prompts += [
            world.moving("film", [], [0]),
            world.moving("both", [0, 1], [1, 3]),
            world.moving("again", [2], [2]),
        ]
    return [(asked, torch.randint(20, 300, (3 + i % 3,), generator=generator)) for i, asked in enumerate(prompts)]


def ours(module: Module, asked: list[tuple[Prompt, Tensor]]) -> Tensor:
    """Log-probs or values at the tokens of all responses, of one forward."""
    processor = MediaProcessor(media_world(module.transformer.config.model_type).processor)
    readings = [processor.read(prompt) for prompt, _ in asked]
    lengths = torch.tensor([len(response) for _, response in asked])
    packed = pack(
        sequences=[torch.cat([read.token_ids, response]) for read, (_, response) in zip(readings, asked)],
        prompt_lengths=torch.tensor([len(read.token_ids) for read in readings]),
        response_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        readings=readings,
    )
    out = module(*packed.inputs)
    return out[0] if isinstance(module, ActorModule) else out


def one_by_one(module: Module, asked: list[tuple[Prompt, Tensor]]) -> Tensor:
    return torch.cat([ours(module, [one]) for one in asked])


def plain(module: Module, asked: list[tuple[Prompt, Tensor]]) -> Tensor:
    """The same by the model's own forward of each, which a module that pads has as it was loaded."""
    assert not module.packing
    return torch.cat([_plain(module, prompt, response) for prompt, response in asked])


def _plain(module: Module, prompt: Prompt, response: Tensor) -> Tensor:
    model = module.transformer
    given = media_world(model.config.model_type).by_the_processor(prompt)
    size = given["input_ids"].shape[1]
    for name, more in {"input_ids": response, "attention_mask": 1, "mm_token_type_ids": 0}.items():
        if name in given:
            own = torch.as_tensor(more).expand(len(response))
            given[name] = torch.cat([given[name], own[None].to(given[name])], dim=1)
    out = model(**given, use_cache=False)
    if isinstance(module, CriticModule):
        assert module.head is not None
        return out.last_hidden_state[0, size - 1 : -1] @ module.head.weight[0] + module.head.bias
    logits = out.logits[0, size - 1 : -1]
    logits = logits.index_fill(-1, torch.tensor(placeholder_ids(model.config)), -torch.inf)
    return logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]


def gradients(module: Module, found: Tensor) -> dict[str, Tensor]:
    """Of a loss in which every token pulls differently, by name of the weight."""
    module.zero_grad()
    (found * torch.linspace(-1, 1, len(found), dtype=found.dtype)).sum().backward()
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def check_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], **NEAR)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-8 * float(gradient.norm()) + 1e-10, name


def results(module: Module, way: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    asked = rows(media_world(module.transformer.config.model_type))
    found = way(module, asked)
    return found.detach(), gradients(module, found)


def check_media_matter(module: Module, gradient: dict[str, Tensor]) -> None:
    """Other media of the same size change the outputs, and what sees or hears them learns."""
    world = media_world(module.transformer.config.model_type)
    seen, other = (ours(module, [(world.prompt("x", [which]), torch.arange(50, 60))]) for which in (0, 6))
    assert float((seen - other).detach().abs().max()) > 0.1
    part = world.tower.removeprefix("model.")
    tower = [own for name, own in gradient.items() if f".{part}" in f".{name}"]
    total = torch.stack([own.norm() for own in gradient.values()]).norm()
    assert len(tower) > 10 and torch.stack([own.norm() for own in tower]).norm() > 0.01 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_the_actor_is_the_models_own_forward(family: str, written: Callable[[str], str]) -> None:
    check(*(double(ActorModule(written(family), packing=packing)) for packing in (True, False)))


def check(packed: Module, padded: Module) -> None:
    expected = results(padded, plain)
    check_media_matter(packed, expected[1])
    check_same(results(packed, ours), expected)
    check_same(results(packed, one_by_one), expected)
    check_same(results(padded, ours), expected)


@pytest.mark.parametrize("family", ["qwen2_audio", pytest.param("qwen3_vl", marks=needs_torchvision)])
def test_so_is_the_critic(family: str, written: Callable[[str], str]) -> None:
    def build(packing: bool) -> Any:
        critic = CriticModule(written(family), packing=packing)
        critic.configure_model()
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
        return critic.double().train()

    check(build(packing=True), build(packing=False))


@needs_torchvision
@pytest.mark.parametrize("checkpointing", [False, True])
def test_so_are_adapters_with_activations_kept_or_computed_again(
    checkpointing: bool, written: Callable[[str], str]
) -> None:
    def build(packing: bool) -> Any:
        options: dict[str, Any] = {"lora": LoRA(rank=2), "gradient_checkpointing": checkpointing}
        actor = double(ActorModule(written("qwen2_5_vl"), packing=packing, **options))
        generator = torch.Generator().manual_seed(0)
        for name, weight in actor.named_parameters():
            if "lora_" in name:  # one of each pair is zero at the start, when the adapter does nothing
                torch.nn.init.normal_(weight, std=0.1, generator=generator)
        return actor

    check(build(packing=True), build(packing=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_and_computes_the_same(
    family: str, written: Callable[[str], str], tmp_path: Path
) -> None:
    actor = ActorModule(written(family))
    actor.configure_model()
    actor.save_pretrained(tmp_path)
    loaded = ActorModule(str(tmp_path))
    loaded.configure_model()
    asked = rows(media_world(family))
    assert torch.equal(ours(loaded, asked), ours(actor, asked))
    for prompt, _ in asked:
        read, expected = loaded.media.read(prompt), actor.media.read(prompt)
        assert torch.equal(read.token_ids, expected.token_ids)
        for own, item in zip(read.items, expected.items, strict=True):
            assert own.features.keys() == item.features.keys()
            assert all(torch.equal(own.features[name], tensor) for name, tensor in item.features.items())


# --- what would be wrong is seen --------------------------------------------------------------------------------------


def plain_numbers(model: Any, input_ids: Tensor, position_ids: Tensor, *others: Any) -> Tensor:
    return position_ids[None]


@needs_torchvision
@pytest.mark.parametrize("family", MROPE)
def test_plain_positions_where_a_token_has_three_would_be_seen(
    family: str, written: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, asked = double(ActorModule(written(family))), rows(media_world(family))
    right = ours(actor, asked)
    monkeypatch.setattr(media_inputs, "positions", plain_numbers)
    assert float((ours(actor, asked) - right).detach().abs().max()) > 0.1
    # When it is loaded already.
    with pytest.raises(
        ValueError, match=r"gives other log-probs in our forward than in its own .*; set packing: false"
    ):
        ActorModule(written(family)).configure_model()


def test_features_that_do_not_reach_the_model_are_refused_when_it_is_loaded(
    written: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_model = media_inputs.of_model

    def without(model: Any, media: dict[str, Tensor], *others: Any) -> dict[str, Tensor]:
        found = of_model(model, media, *others)
        return {} if "Conditional" not in type(model).__name__ else found

    monkeypatch.setattr(media_inputs, "of_model", without)
    with pytest.raises(ValueError, match="gives other log-probs"):
        ActorModule(written("llava")).configure_model()


@needs_torchvision
def test_another_models_processor_is_refused(written: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=r"does not run in our forward \(.*image_grid_thw"):
        ActorModule(written("llava"), tokenizer=written("qwen2_5_vl")).configure_model()
