"""``lightrft export``: the folder is the policy that the checkpoint holds, whatever strategy wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ranks import on_ranks
from trainer import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightrft.callbacks import HuggingFaceExport
from lightrft.cli import main as command
from lightrft.cli.export import main
from lightrft.lightning_modules import ActorModule
from lightrft.lightning_modules.pretrained import LoRA


def _train(inputs: str, root: str, strategy: str, options: dict[str, Any]) -> tuple[str, str, dict[str, torch.Tensor]]:
    """Checkpoint, folder of HuggingFaceExport, and the policy's weights."""
    run = tiny_run.fit(
        Path(inputs),
        Path(root),
        [tiny_run.checkpoints(), HuggingFaceExport()],
        model=tiny_run.module(Path(inputs), **options),
        max_iterations=1,
        devices=2 if strategy != "auto" else 1,
        strategy=strategy,
    )
    saved = run.checkpoint_callback.last_checkpoint  # type: ignore[union-attr]
    return str(saved), str(Path(run.log_dir) / "huggingface"), tiny_run.weights(run)


@pytest.fixture(scope="module")
def base(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of weights, for adapters to lie on."""
    actor = tiny_run.actor(inputs)
    actor.configure_model()
    folder = tmp_path_factory.mktemp("base")
    actor.save_pretrained(folder)
    return str(folder)


def held(folder: str | Path) -> dict[str, torch.Tensor]:
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tiny_run.CHARACTERS)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tiny_run.CHARACTERS.index(tiny_run.END)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "zero1", "zero3"])
@pytest.mark.parametrize("lora", [False, True])
def test_both_exports_are_the_policy(inputs: Path, tmp_path: Path, base: str, strategy: str, lora: bool) -> None:
    options: dict[str, Any] = {"config": None, "model": base, "lora": LoRA(rank=4)} if lora else {}
    ranks = 1 if strategy == "auto" else 2
    saved, exported, weights = on_ranks(ranks, _train, str(inputs), str(tmp_path), strategy, options)[0]
    main([saved, str(tmp_path / "folder")])
    assert tiny_run.differences(held(exported), weights) == []
    assert tiny_run.differences(held(tmp_path / "folder"), weights) == []
    assert not list((tmp_path / "folder").glob("adapter*"))


@pytest.fixture(scope="module")
def adapted(inputs: Path, base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    options = {"config": None, "model": base, "lora": LoRA(rank=4)}
    saved, _, weights = _train(str(inputs), str(tmp_path_factory.mktemp("adapted")), "auto", options)
    return saved, weights


@pytest.fixture(scope="module")
def plain(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _train(str(inputs), str(tmp_path_factory.mktemp("plain")), "auto", {})[0]


def test_adapters_apart_are_what_peft_puts_on_the_base(
    tmp_path: Path, base: str, adapted: tuple[str, dict[str, torch.Tensor]]
) -> None:
    saved, weights = adapted
    main([saved, str(tmp_path / "adapters"), "--lora", "apart"])
    assert not list((tmp_path / "adapters").glob("model*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapters")
    merged = {name: tensor.detach() for name, tensor in model.merge_and_unload().named_parameters()}
    for name, weight in weights.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapters").base_model_name_or_path == base


def test_what_cannot_be_exported_is_refused_in_a_sentence(
    inputs: Path, tmp_path: Path, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = _train(str(inputs), str(tmp_path / "fresh"), "auto", {"lora": LoRA(rank=4)})[0]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for arguments, says in (
        ([str(inputs), "x"], r"is no checkpoint folder \(it has no checkpoint\.json\)"),
        ([plain, "taken"], "is there already; name a new folder"),
        ([plain, "x", "--lora", "apart"], "trained without LoRA"),
        ([fresh, "x", "--lora", "apart"], "lie on fresh weights, which no folder holds; merge them"),
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match=says):
            main(arguments)
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, plain: str) -> None:
    file = Path(plain) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"__0_0\.distcp is damaged"):
        main([plain, str(tmp_path / "folder")])
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_as_a_starting_point_is_refused_with_the_command(plain: str) -> None:
    for options in ({"model": plain}, {"config": tiny_run.QWEN2, "tokenizer": plain}):
        with pytest.raises(ValueError, match=f"is a checkpoint of a run; .*lightrft export {plain} FOLDER"):
            ActorModule(**options).configure_model()  # type: ignore[arg-type]


def test_the_command_knows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: str) -> None:
    monkeypatch.setattr("sys.argv", ["lightrft", "export", plain, str(tmp_path / "folder")])
    command()
    assert (tmp_path / "folder" / "model.safetensors").is_file()
