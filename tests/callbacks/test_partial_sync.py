"""What a weight sync sends: frozen weights once, adapters alone where asked, one whole tensor at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import EngineSleepWake, StaleWeightsError, WeightSync
from lightrft.engines import TransformersEngine
from lightrft.lightning_modules import ActorModule, pretrained
from lightrft.lightning_modules.pretrained import LoRA
from lightrft.module import RFTModule
from lightrft.trainer import RFTTrainer

Named = Iterable[tuple[str, Tensor]]
UNTIED = tiny_run.QWEN2 | {"tie_word_embeddings": False}
QUERIES, KEYS = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")


class Recording(TransformersEngine):
    """Notes what each push brings; ``alive`` are the tensors of it that still live."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pushes: list[set[str]] = []
        self.adapters: list[dict[str, Tensor]] = []
        self._given: list[Any] = []

    def update_weights(self, tensors: Named, version: int) -> None:
        self.pushes.append(set())
        super().update_weights(self._noted(tensors), version)

    def update_adapter(self, scaling: float, tensors: Named, version: int) -> None:
        self.adapters.append({name: tensor.clone() for name, tensor in tensors})
        super().update_adapter(scaling, self.adapters[-1].items(), version)

    @property
    def alive(self) -> int:
        return sum(one() is not None for one in self._given)

    def _noted(self, tensors: Named) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.pushes[-1].add(name)
            self._given.append(weakref.ref(tensor))
            yield name, tensor
            del tensor


def actor(inputs: Path, **options: Any) -> ActorModule:
    settings: dict[str, Any] = {"freeze": ["*.embed_tokens.*", "*.layers.0.*", "*.q_proj.*"], "config": UNTIED}
    settings["optimizer"] = lambda params: torch.optim.AdamW(params, lr=1e-2)
    return ActorModule(tokenizer=str(inputs / "tokenizer"), **settings | options)


def run(
    inputs: Path, root: Path, engine: Any, *callbacks: RFTCallback, model: ActorModule, level: Any = 1, **options: Any
) -> RFTTrainer:
    sync = [] if any(isinstance(one, WeightSync) for one in callbacks) else [WeightSync()]
    usual = [tiny_run.sampler(engine), *sync, EngineSleepWake(level), *callbacks]
    trainer = tiny_run.trainer(root, usual=usual, responses_per_update=16, **options)
    trainer.fit(RFTModule(model, Algorithm(), tiny_run.scoring(tiny_run.shortness)), tiny_run.data(inputs))
    return trainer


def names_of(trainer: RFTTrainer) -> set[str]:
    return {name for name, _ in trainer.model.export_parameters()}


# --- frozen weights ---------------------------------------------------------------------------------------------------


def test_frozen_weights_travel_once_and_with_a_trained_sibling_each_time(inputs: Path, tmp_path: Path) -> None:
    engine = Recording()
    trainer = run(inputs, tmp_path, engine, model=actor(inputs))
    everything = names_of(trainer)
    frozen = {name for name in everything if "embed_tokens" in name or "layers.0." in name}
    # The queries of the other block are frozen as well, but alone they would be one shard of a fused layer.
    assert engine.pushes == [everything, everything - frozen, everything - frozen]
    assert QUERIES in frozen and QUERIES.replace(".0.", ".1.") not in frozen


def test_frozen_weights_travel_again_where_the_engine_lost_them(inputs: Path, tmp_path: Path) -> None:
    engine = Recording()
    trainer = run(inputs, tmp_path, engine, model=actor(inputs), level=2)
    assert engine.pushes == [names_of(trainer)] * 3


def test_a_frozen_weight_that_the_engine_lost_unsaid_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    class Forgets(Recording):
        def update_weights(self, tensors: Named, version: int) -> None:
            super().update_weights(tensors, version)
            if version == 1:
                self._model.get_parameter(KEYS).data[0, 0] += 1e-6

    with pytest.raises(StaleWeightsError, match=rf"version 1: 1 of .* first {KEYS} "):
        run(inputs, tmp_path, Forgets(), model=actor(inputs))


def test_what_is_frozen_midway_travels_once_more(inputs: Path, tmp_path: Path) -> None:
    class Freezes(RFTCallback):
        def on_iteration_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.progress.iteration == 1:
                pl_module.actor.transformer.get_input_embeddings().requires_grad_(False)

    engine, embedding = Recording(), "model.embed_tokens.weight"
    run(inputs, tmp_path, engine, Freezes(), model=actor(inputs, freeze=None))
    assert [embedding in push for push in engine.pushes] == [True, True, False]


def test_a_run_is_the_same_whether_frozen_weights_travel_or_not(inputs: Path, tmp_path: Path) -> None:
    runs = [run(inputs, tmp_path / str(level), Recording(), model=actor(inputs), level=level) for level in (1, 2)]
    assert tiny_run.differences(*map(tiny_run.weights, runs)) == []


# --- LoRA -------------------------------------------------------------------------------------------------------------


def lora(inputs: Path, **options: Any) -> ActorModule:
    return actor(inputs, freeze=None, lora=LoRA(rank=2, alpha=6.0, **options))


def test_merged_lora_leaves_out_what_no_adapter_changes(inputs: Path, tmp_path: Path) -> None:
    engine = Recording()
    trainer = run(inputs, tmp_path, engine, model=lora(inputs))
    everything = names_of(trainer)
    # Biases stay as they are, but are siblings of what the adapter changes.
    assert engine.pushes == [everything, *[{name for name in everything if "_proj." in name}] * 2]


def test_an_adapter_alone_follows_the_base(inputs: Path, tmp_path: Path) -> None:
    engine = Recording()
    trainer = run(inputs, tmp_path, engine, WeightSync(lora="adapter"), model=lora(inputs))
    assert engine.pushes == [names_of(trainer)]
    layers = [name.removesuffix(".weight") for name in names_of(trainer) if name.endswith("_proj.weight")]
    assert set(engine.adapters[0]) == {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    ups = [sum(float(one[f"{layer}.lora_B.weight"].abs().sum()) for layer in layers) for one in engine.adapters]
    assert len(ups) == 3 and ups[0] == 0 < ups[1]
    assert trainer.callback_metrics["weight_sync/mismatch_nats"] < 1e-5


def test_adapters_survive_either_sleep(inputs: Path, tmp_path: Path) -> None:
    def one(level: Any) -> RFTTrainer:
        return run(inputs, tmp_path / str(level), Recording(), WeightSync("adapter"), model=lora(inputs), level=level)

    assert tiny_run.differences(*(tiny_run.weights(one(level)) for level in (1, 2))) == []


def test_an_adapter_matrix_that_is_off_by_a_bit_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    class Bends(TransformersEngine):
        def update_adapter(self, scaling: float, tensors: Named, version: int) -> None:
            super().update_adapter(scaling, tensors, version)
            next(iter(self._adapter.matrices.values())).view(torch.int32)[0, 0] ^= 1

    with pytest.raises(StaleWeightsError, match=r"version 0: 1 of .*lora_A\.weight "):
        run(inputs, tmp_path, Bends(), WeightSync(lora="adapter"), model=lora(inputs))


def test_a_scaling_that_is_off_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    class Scales(TransformersEngine):
        def update_adapter(self, scaling: float, tensors: Named, version: int) -> None:
            super().update_adapter(scaling * 1.5, tensors, version)

    with pytest.raises(StaleWeightsError, match="log-probs of scored probe tokens"):
        run(inputs, tmp_path, Scales(), WeightSync(lora="adapter"), model=lora(inputs))


def test_an_adapter_without_lora_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora=adapter, but model\.actor\.lora is not set"):
        run(inputs, tmp_path, TransformersEngine(), WeightSync(lora="adapter"), model=actor(inputs))
    with pytest.raises(ValueError, match="lora is 'apart'"):
        WeightSync(lora="apart")  # type: ignore[arg-type]


# --- over ranks -------------------------------------------------------------------------------------------------------


def _on_shards(inputs: Path, root: Path, strategy: str, kind: str) -> dict[str, Any]:
    engine = Recording("bfloat16")
    gathered: set[torch.dtype] = set()
    alive: list[int] = []
    full_tensor, whole = DTensor.full_tensor, pretrained.whole

    def noted_dtype(tensor: DTensor, **options: Any) -> Tensor:
        gathered.add(tensor.dtype)
        return full_tensor(tensor, **options)

    def noted_alive(*arguments: Any) -> Tensor:
        alive.append(engine.alive)
        return whole(*arguments)

    DTensor.full_tensor, pretrained.whole = noted_dtype, noted_alive  # type: ignore[method-assign, assignment]
    model = {"frozen": actor, "lora": lora, "adapter": lora}[kind](inputs)
    sync = WeightSync("adapter" if kind == "adapter" else "merged")
    trainer = run(inputs, root, engine, sync, model=model, strategy=strategy, devices=2)
    found = {"gathered": gathered, "alive": set(alive), "pushes": engine.pushes, "adapters": len(engine.adapters)}
    return found | {"weights": {name: weight.tolist() for name, weight in tiny_run.weights(trainer).items()}}


@pytest.mark.parametrize("kind", ["frozen", "lora", "adapter"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_shards_travel_one_tensor_at_a_time_in_the_engines_dtype(
    inputs: Path, tmp_path: Path, strategy: str, kind: str
) -> None:
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    one, two = on_ranks(2, _on_shards, inputs, tmp_path, strategy, kind)
    assert one["pushes"] == two["pushes"] and one["weights"] == two["weights"]
    assert len(one["pushes"]) == (1 if kind == "adapter" else 3) and one["adapters"] == (3 if kind == "adapter" else 0)
    assert all(push < one["pushes"][0] for push in one["pushes"][1:])
    assert one["alive"] == two["alive"] == {0}  # whenever the next one is made
    if strategy == "fsdp2":
        assert torch.bfloat16 in one["gathered"]
