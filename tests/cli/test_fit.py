"""``lightrft fit`` and ``lightrft validate``: what YAML, options and environment do, and what is refused early."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_config
import torch
import yaml
from trainer import tiny_run

from lightrft.cli.fit import main
from lightrft.rewards import Reward, RewardInput

Run = Callable[..., Path]


class Shortness(Reward):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def score(self, item: RewardInput) -> float:
        return self.scale * tiny_run.shortness(item)


@pytest.fixture
def config(inputs: Path, tmp_path: Path) -> dict[str, Any]:
    return small_config.config(inputs, tmp_path / "runs")


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``fit`` with the configuration and further arguments; returns the log folder."""
    monkeypatch.setattr(sys, "argv", ["lightrft"])

    def call(*arguments: str, command: str = "fit", **changed: Any) -> Path:
        path = small_config.written(tmp_path / "config.yaml", {**config, **changed})
        main([command, "--config", path, *arguments])
        return small_config.runs(tmp_path / "runs")[-1]

    yield call


def steps(folder: Path) -> set[int]:
    return set(tiny_run.rows(folder))


def saved(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


# What configures a run


def test_options_override_the_file_and_add_to_its_lists(run: Run) -> None:
    folder = run(
        "--trainer.max_iterations=2", "--trainer.callbacks+=TrajectoryWriter", "--trainer.callbacks.token_ids=true"
    )
    assert steps(folder) == {0, 1, 2}
    assert "token_ids" in next(iter(tiny_run.trajectories(folder).values()))
    names = [callback["class_path"] for callback in saved(folder)["trainer"]["callbacks"]]
    assert names[-1].endswith(".TrajectoryWriter") and len(names) == 5


def test_of_two_files_the_later_wins_key_by_key(run: Run, tmp_path: Path) -> None:
    later = {"trainer": {"max_iterations": 2}, "model": {"algorithm": {"class_path": "Algorithm"}}}
    folder = run("--config", small_config.written(tmp_path / "later.yaml", later))
    assert steps(folder) == {0, 1, 2}
    assert saved(folder)["trainer"]["prompts_per_iteration"] == 4
    assert saved(folder)["model"]["algorithm"]["class_path"].endswith(".Algorithm")


def test_environment_variables_configure_and_options_override_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__GRADIENT_CLIP_VAL", "0.25")
    monkeypatch.setenv("PL_FIT__TRAINER__EPOCHS_PER_ITERATION", "2")
    settings = saved(run("--trainer.epochs_per_iteration=1"))["trainer"]
    assert settings["gradient_clip_val"] == 0.25 and settings["epochs_per_iteration"] == 1


def test_the_saved_configuration_runs_again_bit_by_bit(run: Run) -> None:
    first = run("--seed_everything=3", "--trainer.max_iterations=2")
    main(["fit", "--config", str(first / "config.yaml")])
    second = small_config.runs(first.parent)[-1]
    assert first != second and tiny_run.rows(first) == tiny_run.rows(second) and len(steps(first)) == 3
    assert saved(first) == saved(second)
    states = [tiny_run.saved_state(folder / "checkpoints/iteration-000002") for folder in (first, second)]
    assert tiny_run.differences(*states) == []


def test_the_printed_configuration_is_the_one_that_is_saved(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert stopped.value.code == 0 and saved(run()) == printed


@pytest.mark.parametrize(
    ("fire", "printed"),
    [
        ({}, {"temperature": 10.0, "top_k": 16}),
        ({"temperature": 20}, {"temperature": 20.0, "top_k": 16}),
        (None, None),
    ],
    ids=str,
)
def test_a_hot_first_token_is_configured_within_the_sampling(
    run: Run, config: dict[str, Any], capsys: pytest.CaptureFixture[str], fire: Any, printed: Any
) -> None:
    config["trainer"]["callbacks"][0]["init_args"]["sampling"] = {"max_new_tokens": 5, "fire": fire}
    with pytest.raises(SystemExit) as stopped:
        run("--print_config")
    rollout = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]
    assert stopped.value.code == 0 and rollout["init_args"]["sampling"]["fire"] == printed


def test_the_seed_of_everything_is_the_runs(run: Run, config: dict[str, Any]) -> None:
    def seed_of(*arguments: str) -> int:
        folder = run(*arguments)
        return torch.load(folder / "checkpoints/iteration-000001/rank-0.pt", weights_only=True)["run"]["seed"]

    assert seed_of("--seed_everything=7") == 7
    assert seed_of("--seed_everything=true") == 7  # Lightning: the seed that the process had before
    assert seed_of() == 0
    for given in ({"arguments": ["--trainer.seed=5"]}, {"trainer": config["trainer"] | {"seed": 5}}):
        with pytest.raises(SystemExit):  # a second seed would have no effect
            run(*given.pop("arguments", []), **given)


@pytest.mark.parametrize(
    "reward",
    [
        {"class_path": "FunctionReward", "init_args": {"function": "small_config.shortness"}},
        {"class_path": "test_fit.Shortness", "init_args": {"scale": 1.0}},
    ],
    ids=["function", "class"],
)
def test_a_users_reward_by_dotted_path(run: Run, config: dict[str, Any], reward: dict[str, Any]) -> None:
    recipes = {"exact_match": [{"reward": reward, "name": "mine"}]}
    row = tiny_run.rows(run(model=config["model"] | {"rewards": {"recipes": recipes}}))[1]
    assert float(row["reward/mine/mean"]) == float(row["reward/mean"]) > 0


def test_an_algorithm_by_name_and_by_its_axes(run: Run, config: dict[str, Any]) -> None:
    axes = {"class_path": "lightrft.algorithms.Algorithm", "init_args": {"kl": "none"}}
    by_name, by_axes = run(), run(model=config["model"] | {"algorithm": axes})
    rows = [tiny_run.rows(folder)[1] for folder in (by_name, by_axes)]
    assert "kl_loss" in rows[0] and "kl_loss" not in rows[1]


def test_a_refused_choice_says_why(run: Run, config: dict[str, Any]) -> None:
    for axes, reason in (
        ({"kl": "loss_k1"}, "the expected gradient of k1 on policy is 0"),
        ({"preset": "gspo", "aggregation": "token_sum_norm"}, "would add it once for each token"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(model=config["model"] | {"algorithm": {"class_path": "Algorithm", "init_args": axes}})


def test_a_dry_run_leaves_nothing(run: Run, config: dict[str, Any], tmp_path: Path) -> None:
    callbacks = ["RunSummary", "Throughput", "TrajectoryWriter", "HuggingFaceExport", "ProgressBar"]
    config["trainer"]["callbacks"] += [{"class_path": name} for name in callbacks]
    with pytest.raises(IndexError):  # no log folder
        run("--trainer.fast_dev_run=true")
    assert not (tmp_path / "runs").exists()


def test_resuming_by_option_goes_on_from_the_last_checkpoint(run: Run) -> None:
    whole = run("--trainer.max_iterations=2")
    run()
    resumed = run("--trainer.max_iterations=2", "--ckpt_path=last")
    assert steps(resumed) == {2} and tiny_run.rows(resumed)[2] == tiny_run.rows(whole)[2]


def test_validate_measures_a_checkpoint(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    trained = run("--trainer.max_iterations=2")
    folder = run(f"--ckpt_path={trained / 'checkpoints' / 'iteration-000002'}", command="validate")
    assert folder != trained
    wanted = {k: v for k, v in tiny_run.rows(trained)[2].items() if k.startswith("val/")}
    assert len(wanted) > 10 and tiny_run.rows(folder) == {2: wanted | {"step": "2"}}
    (sampled,) = tiny_run.rows(run("--samples_per_prompt=4", "--temperature=1.0", command="validate")).values()
    assert float(sampled["val/groups_without_spread"]) < 1


# What is refused before training


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--trainer.max_iteration=2"], "--trainer.max_iteration=2"),
        (["--trainer.callbacks.frequency=2"], "frequency"),
        (["--data.shufle=true"], "--data.shufle=true"),
    ],
)
def test_an_unknown_option_fails_with_its_name(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], names: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and names in capsys.readouterr().err


@pytest.mark.parametrize("where", ["trainer", "data", "model"])
def test_an_unknown_key_fails_with_its_name(
    run: Run, config: dict[str, Any], capsys: pytest.CaptureFixture[str], where: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(**{where: config[where] | {"unheard_of": 1}})
    assert stopped.value.code == 2 and "unheard_of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        (["--model.algorithm=gropo"], ValueError, r"No algorithm is called 'gropo'; choose one of .*grpo"),
        (["--trainer.responses_per_update=6"], ValueError, r"responses_per_update=6 must divide .* = 16"),
        (["--trainer.responses_per_update=0"], ValueError, r"responses_per_update is 0; it must be at least 1"),
        (["--trainer.gradient_clip_val=0"], ValueError, r"gradient_clip_val is 0\.0; it must be above 0"),
        (["--trainer.limit_val_prompts=0"], ValueError, r"limit_val_prompts is 0; it must be at least 1"),
        (
            ["--trainer.samples_per_prompt=1", "--trainer.responses_per_update=4"],
            ValueError,
            r"samples_per_prompt is 1, but the advantage group_norm",
        ),
        (["--trainer.strategy=fsdp"], ValueError, r"strategy='fsdp' is not supported; use fsdp2"),
        (["--data.train.path=no/such.jsonl"], FileNotFoundError, r"no data file or folder no/such\.jsonl"),
        (["--data.val=null"], ValueError, r"data\.val names no source"),
        (["--ckpt_path=last"], ValueError, r"ckpt_path is 'last', but there is no checkpoint"),
        (["--ckpt_path=no/such"], ValueError, r"ckpt_path 'no/such' is no checkpoint folder"),
        (
            ["--model.actor.init_args.config=null", "--model.actor.init_args.model=no/such/model"],
            ValueError,
            r"There is no model folder 'no/such/model'; check the path",
        ),
        (["--model.actor.init_args.tokenizer=no/such/one"], ValueError, r"no tokenizer folder 'no/such/one'"),
        (
            ["--model.actor.init_args.config.hiden_size=8"],
            ValueError,
            r"key 'hiden_size'; did you mean 'hidden_size'\?",
        ),
        (["--model.actor.init_args.model=x"], ValueError, r"either model .* or config"),
        (
            ["--model.actor.init_args.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"],
            ValueError,
            "ReduceLROnPlateau waits for a metric",
        ),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence_before_training(
    run: Run, tmp_path: Path, arguments: list[str], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("**/metrics.csv"))


def test_a_label_without_a_recipe_and_a_recipe_without_a_label_are_refused(run: Run, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"For the label 'exact_match2' there is no reward recipe"):
        path = Path(config["data"]["train"]["path"])
        records = path.with_name("other.jsonl")
        records.write_text(path.read_text().replace("exact_match", "exact_match2"))
        run(f"--data.train.path={records}")
    recipes = config["model"]["rewards"]["recipes"]
    recipes["exactmatch"] = recipes["exact_match"]
    with pytest.raises(ValueError, match=r"No prompt has the label 'exactmatch', so its reward recipe .* no effect"):
        run()


def test_validate_refuses_samples_that_would_be_equal(run: Run) -> None:
    with pytest.raises(ValueError, match="4 greedy samples of a prompt are equal"):
        run("--samples_per_prompt=4", command="validate")


# The command itself


def test_without_a_command_and_with_an_unknown_one_the_commands_are_named() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def lightrft(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lightrft.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    for arguments in ([], ["--help"]):
        shown = lightrft(*arguments)
        names = ("fit", "validate", "plan", "supervised", "export", "chat")
        assert shown.returncode == 0 and all(name in shown.stdout for name in names)
    unknown = lightrft("fitt")
    assert unknown.returncode == 1 and unknown.stderr == (
        "lightrft: no command 'fitt'; there are fit, validate, plan, supervised, export, chat.\n"
    )


def test_the_command_line_itself_runs(config: dict[str, Any], tmp_path: Path) -> None:
    path = small_config.written(tmp_path / "config.yaml", config)
    done = subprocess.run(
        [sys.executable, "-m", "lightrft.cli", "fit", "--config", path, "--trainer.callbacks+=ProgressBar"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "1/1" in done.stderr and "Checkpoint: " in done.stderr
