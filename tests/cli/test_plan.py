"""``lightrft plan``: what it tells of a configuration of ``fit``, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_config
import torch
from media_worlds import media_world
from trainer import tiny_run

from lightrft.analysis.live_bytes import LiveBytes
from lightrft.callback import RFTCallback
from lightrft.cli import fit, plan
from lightrft.lightning_modules.footprint import MicroBatch

Told = Callable[..., str]
BIG = {**tiny_run.QWEN2, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
BIG |= {"num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 4096}


@pytest.fixture
def config(inputs: Path, tmp_path: Path) -> dict[str, Any]:
    settings = small_config.config(inputs, tmp_path / "runs")
    settings["model"]["actor"]["init_args"]["config"] = dict(BIG)
    settings["trainer"]["callbacks"].append({"class_path": "EngineSleepWake"})
    settings["trainer"]["callbacks"][0]["init_args"]["sampling"]["max_new_tokens"] = 64
    settings["trainer"] |= {"accelerator": "auto", "prompts_per_iteration": 32, "responses_per_update": 128}
    return settings


@pytest.fixture
def told(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Told:
    """What is printed for the configuration with further arguments."""
    monkeypatch.setattr(sys, "argv", ["lightrft"])

    def call(*arguments: str) -> str:
        plan.main(["--config", small_config.written(tmp_path / "config.yaml", config), *arguments])
        return capsys.readouterr().out

    return call


def numbers(text: str) -> dict[str, dict[str, int]]:
    return {name: phase["device"] for name, phase in json.loads(text)["phases"].items()}


def test_what_fits_is_told_with_its_sizes_and_its_largest_term(told: Told, tmp_path: Path) -> None:
    text = told("--device_memory_gib=80", "--prompt_tokens=100")
    assert "32 prompts x 4 responses on 1 rank(s), 1 update(s) of 128 responses" in text
    assert "2 micro-batch(es) an update at full length (100 + 64 tokens)" in text
    for phase in ("rollout", "score", "advantages", "update actor", "iteration", "in host memory"):
        assert f"\n{phase} " in text
    assert "Most is held in update actor" in text and "its largest term is actor activations" in text
    assert text.rstrip().endswith("It fits: a device of 80.0 GiB has 78.0 for tensors.")
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_refused_with_the_reason_and_a_remedy(told: Told) -> None:
    with pytest.raises(SystemExit) as refused:
        told("--device_memory_gib=6", "--reserve_gib=1")
    said = str(refused.value.code)
    assert "update actor needs" in said and "a device of 6.0 GiB has 5.0 for tensors" in said
    assert "actor activations is the largest term; set gradient_checkpointing: true" in said
    remedied = ["--model.actor.init_args.gradient_checkpointing=true", "--trainer.tokens_per_microbatch=4096"]
    assert "It fits" in told("--device_memory_gib=6", "--reserve_gib=1", *remedied)


@pytest.mark.parametrize(
    ("arguments", "largest", "remedy"),
    [
        (["--trainer.tokens_per_microbatch=64", "--device_memory_gib=1.5"], "actor optimizer", "fsdp2_offload"),
        (
            ["--trainer.tokens_per_microbatch=64", "--device_memory_gib=1.5", "--trainer.devices=2"],
            "actor optimizer",
            "set trainer.strategy to fsdp2;",
        ),
    ],
)
def test_the_remedy_is_the_largest_terms(told: Told, arguments: list[str], largest: str, remedy: str) -> None:
    with pytest.raises(SystemExit) as refused:
        told("--reserve_gib=0.5", "--prompt_tokens=16", *arguments)
    assert f"{largest} is the largest term" in str(refused.value.code) and remedy in str(refused.value.code)


def test_devices_that_are_not_here_are_planned_for(told: Told) -> None:
    def needs(*arguments: str) -> dict[str, dict[str, int]]:
        return numbers(told("--json=true", "--device_memory_gib=80", *arguments))

    one = needs()
    many = needs("--trainer.devices=8", "--trainer.num_nodes=2", "--trainer.strategy=fsdp2")
    assert many["score"]["actor optimizer"] == one["score"]["actor optimizer"] / 16
    replicated = needs("--trainer.devices=0,1,2,3")
    assert replicated["score"]["actor optimizer"] == one["score"]["actor optimizer"]
    assert replicated["score"]["actor reduction buckets"] == one["score"]["actor weights"]
    offloaded = needs("--trainer.devices=4", "--trainer.strategy=zero2_offload")
    assert "actor optimizer" not in offloaded["score"]
    apart = needs("--trainer.devices=4", "--trainer.strategy={default: auto, reference: fsdp2}")
    assert apart["score"]["reference weights"] * 4 == apart["score"]["actor weights"]


def test_ranks_that_share_sequences_hold_a_part_of_their_activations(told: Told) -> None:
    def activations(*arguments: str) -> int:
        found = numbers(told("--json=true", "--device_memory_gib=80", "--trainer.devices=4", *arguments))
        return found["update actor"]["actor activations"]

    budget = ["--trainer.tokens_per_microbatch=1152"]
    whole = activations("--trainer.tokens_per_microbatch=2304")
    assert activations("--trainer.sequence_parallel_size=2", *budget) == pytest.approx(whole / 2, rel=0.05)
    with pytest.raises(ValueError, match=r"sequence_parallel_size=3 does not divide 4 rank"):
        activations("--trainer.sequence_parallel_size=3", *budget)


def test_an_engine_over_two_ranks_holds_half_of_its_weights_on_each(config: dict[str, Any], told: Told) -> None:
    engine = config["trainer"]["callbacks"][0]["init_args"]["engine"]
    found = []
    for size in (1, 2):
        engine["init_args"] = {"tensor_parallel_size": size}
        text = told("--json=true", "--device_memory_gib=80", "--trainer.devices=2")
        found.append(numbers(text)["rollout"]["engine weights"])
    assert found[1] * 2 == found[0]


def test_an_update_that_ranks_cannot_share_is_refused_as_by_fit(told: Told) -> None:
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        told("--trainer.devices=3")
    with pytest.raises(ValueError, match=r"strategy='fsdp' is not supported; use fsdp2"):
        told("--trainer.strategy=fsdp")


def test_precision_decides_over_weights_copies_and_engine(told: Told) -> None:
    full, mixed, half = (
        numbers(told("--json=true", "--device_memory_gib=80", f"--trainer.precision={name}"))
        for name in ("32-true", "bf16-mixed", "bf16-true")
    )
    weights = full["score"]["actor weights"]
    assert mixed["score"]["actor weights"] == weights == 2 * half["score"]["actor weights"]
    assert mixed["rollout"]["engine weights"] == weights / 2
    assert 0.8 < mixed["advantages"]["actor weight copies"] / (weights / 2) <= 1
    sums = [sum(found["update actor"].values()) for found in (full, mixed, half)]
    assert sums == sorted(sums, reverse=True)


def test_lora_trains_adapters_alone_and_needs_no_reference(told: Told) -> None:
    found = numbers(told("--json=true", "--device_memory_gib=80", "--model.actor.init_args.lora.rank=8"))
    assert "reference weights" not in found["score"]
    assert 0 < found["score"]["actor optimizer"] < found["score"]["actor weights"] / 10
    assert found["rollout"]["engine weights"] < found["score"]["actor weights"]


def test_of_what_sees_only_the_weights_are_told_and_that_is_said(
    config: dict[str, Any], told: Told, tmp_path: Path
) -> None:
    world = media_world("llava")
    world.model.save_pretrained(tmp_path / "llava")
    world.processor.save_pretrained(tmp_path / "llava")
    config["model"]["actor"]["init_args"] |= {"model": str(tmp_path / "llava"), "config": None, "tokenizer": None}
    note = "What sees or hears is in the numbers with its weights alone"
    assert note in told("--device_memory_gib=80", "--prompt_tokens=100")


def test_a_critic_has_a_phase_of_its_own(config: dict[str, Any], told: Told) -> None:
    config["model"] |= {"algorithm": "ppo", "critic": {"class_path": "CriticModule", "init_args": {"config": BIG}}}
    found = numbers(told("--json=true", "--device_memory_gib=80"))
    assert "critic weights" in found["score"] and "critic activations" in found["update critic"]
    assert "critic gradients" not in found["update actor"]


def test_what_is_offloaded_is_on_the_host_while_the_engine_samples(config: dict[str, Any], told: Told) -> None:
    parts = ["optimizer", "reference", "critic"]
    config["trainer"]["callbacks"].append({"class_path": "OffloadDuringRollout", "init_args": {"parts": parts}})
    config["model"] |= {"algorithm": {"class_path": "Algorithm", "init_args": {"preset": "ppo", "kl": "loss_k3"}}}
    config["model"]["algorithm"]["init_args"]["kl_coefficient"] = 0.1
    config["model"]["critic"] = {"class_path": "CriticModule", "init_args": {"config": BIG}}
    text = told("--json=true", "--device_memory_gib=80")
    found, host = numbers(text), json.loads(text)["phases"]["rollout"]["host"]
    moved = {"actor optimizer", "critic optimizer", "critic weights", "reference weights"}
    assert moved <= found["advantages"].keys() and moved <= host.keys()
    assert not moved & found["rollout"].keys() and "actor weights" in found["rollout"]


def test_the_environment_configures_as_for_fit(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__EPOCHS_PER_ITERATION", "2")
    assert "2 update(s) of 128 responses" in told("--device_memory_gib=80")


@pytest.mark.parametrize("option", ["--trainer.max_iteration=2", "--device_memory=80", "--ckpt_path=last"])
def test_an_unknown_option_is_refused_with_its_name(
    told: Told, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        told(option)
    assert stopped.value.code == 2 and option in capsys.readouterr().err


def test_options_out_of_range_are_refused(config: dict[str, Any], told: Told) -> None:
    for options in (["--prompt_tokens=0"], ["--reserve_gib=9", "--device_memory_gib=8"]):
        with pytest.raises(SystemExit, match=r"--prompt_tokens must be at least 1"):
            told(*options)
    with pytest.raises(ValueError, match="max_new_tokens 4096 leaves no room for a prompt"):
        config["trainer"]["callbacks"][0]["init_args"]["sampling"]["max_new_tokens"] = 4096
        told()


def test_memory_is_taken_of_no_device(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the host neither: weights of this size would be seen."""
    config = {"hidden_size": 8192, "intermediate_size": 65536, "num_attention_heads": 64, "num_hidden_layers": 12}
    arguments = [f"--model.actor.init_args.config.{name}={value}" for name, value in config.items()]
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: made.append(1))
    with pytest.raises(SystemExit, match="This does not fit"):
        told("--device_memory_gib=80", *arguments)
    assert not made


def test_the_longest_prompt_is_the_datas_where_it_says_so(told: Told) -> None:
    assert "(512 + 64 tokens)" in told("--device_memory_gib=80")
    assert "(99 + 64 tokens)" in told("--device_memory_gib=80", "--data.max_prompt_tokens=99")
    assert "(7 + 64 tokens)" in told("--device_memory_gib=80", "--data.max_prompt_tokens=99", "--prompt_tokens=7")


# --- against a run ----------------------------------------------------------------------------------------------------


class Peaks(RFTCallback):
    """The most bytes alive in each phase, of all tensors of the process."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.found = live, dict[str, int]()

    def on_phase_start(self, trainer: Any, pl_module: Any, phase: str) -> None:
        self.live.peak = dict(self.live.now)

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        self.found[phase] = max(self.found.get(phase, 0), sum(self.live.peak.values()))


@pytest.mark.parametrize(
    "options",
    # Padded where it is mixed: the CPU has no variable-length kernel in half precision.
    [
        {},
        {"precision": "bf16-mixed", "packing": False},
        {"gradient_checkpointing": True},
        {"lora": {"rank": 8}},
        {"responses_per_update": 8},
        {"algorithm": "ppo"},
    ],
    ids=str,
)
def test_a_runs_peaks_are_those_that_are_planned(
    config: dict[str, Any], told: Told, tmp_path: Path, options: dict[str, Any]
) -> None:
    sizes = {**BIG, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    actor, trainer = config["model"]["actor"]["init_args"], config["trainer"]
    trainer |= {"accelerator": "cpu", "max_iterations": 2, "prompts_per_iteration": 8, "responses_per_update": 32}
    trainer |= {"tokens_per_microbatch": 16 * 68}
    trainer["callbacks"] = trainer["callbacks"][:2]  # what sleeps on a CPU stays where it is
    actor["config"] = sizes
    config["data"].pop("val")
    for name, value in options.items():
        owners = {"responses_per_update": trainer, "precision": trainer, "algorithm": config["model"]}
        owners.get(name, actor)[name] = value
    if options.get("algorithm") == "ppo":
        config["model"]["critic"] = {"class_path": "CriticModule", "init_args": {"config": sizes}}
    planned = {name: sum(terms.values()) for name, terms in numbers(told("--json=true", "--prompt_tokens=4")).items()}
    planned["update"] = max(size for name, size in planned.items() if name.startswith("update"))

    cli = fit.RFTCLI(args=["--config", str(tmp_path / "config.yaml")], run=False)
    with LiveBytes() as live:
        peaks = Peaks(live)
        cli.trainer.callbacks.append(peaks)
        cli.trainer.fit(cli.model, cli.datamodule)
    workspace = 32 * 2**20  # of a GPU's libraries
    for phase in ("rollout", "score", "advantages", "update"):
        assert planned[phase] - workspace == pytest.approx(peaks.found[phase], rel=0.1), (phase, planned, peaks.found)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "length", "budget", "parallel", "tokens"),
    [
        (8, 100, 1000, 1, 800),
        (80, 100, 1000, 1, 1000),
        (8, 100, 50, 1, 100),
        (80, 300, 1000, 1, 1000),
        (80, 100, 1000, 4, 250),
    ],
)
def test_the_fullest_micro_batch_is_as_full_as_may_be(
    rows: int, length: int, budget: int, parallel: int, tokens: int
) -> None:
    batch = plan._fullest(rows, length, 40, budget, parallel)
    assert isinstance(batch, MicroBatch) and batch.tokens == tokens


@pytest.mark.parametrize(
    ("devices", "count"), [(8, 8), ("8", 8), ("0,2,", 2), ([0, 1, 5], 3), ("auto", 1), (-1, 1), ("-1", 1)]
)
def test_devices_are_counted_as_fabric_counts_them(devices: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert plan._devices(devices) == count
