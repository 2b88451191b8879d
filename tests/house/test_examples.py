"""The examples do what their READMEs say, with the commands that stand there."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightrft.algorithms import Algorithm
from lightrft.samples import Batch

ROOT = Path(__file__).parents[2]
CUSTOM = ROOT / "examples" / "custom_algorithm"
LENGTH = "def length(item):\n    return float(len(item.response))\n"
SHORT = {
    "trainer": {"max_iterations": 1, "prompts_per_iteration": 8, "samples_per_prompt": 4, "responses_per_update": None},
    "model": {
        "rewards": {
            "recipes": {
                "exact_match": [
                    {"reward": {"class_path": "FunctionReward", "init_args": {"function": "stand_in.length"}}}
                ]
            }
        }
    },
}


def test_the_custom_algorithm_runs_as_its_readme_says_and_its_classes_make_the_metrics(quickstart: Path) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", (CUSTOM / "README.md").read_text(), flags=re.DOTALL)
    (path, *command) = shlex.split(block)
    assert path == "PYTHONPATH=examples/custom_algorithm" and command[:2] == ["lightrft", "fit"]
    arguments = [str(ROOT / word) if word.endswith(".yaml") else word for word in command[1:]]
    # An untrained model answers nothing; the length of its answers differs within groups.
    (quickstart / "stand_in.py").write_text(LENGTH)
    (quickstart / "short.yaml").write_text(yaml.safe_dump(SHORT))
    done = subprocess.run(
        [sys.executable, "-m", "lightrft.cli", *arguments, "--config", "short.yaml"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(CUSTOM), str(quickstart), os.environ["PYTHONPATH"]])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = "grpo: advantage QuantileAdvantage(quantile=0.4), objective SoftClip(tau_positive=1.0, tau_negative=1.05)"
    assert shown in done.stdout + done.stderr
    run = quickstart / "runs/custom_algorithm/version_0"
    with (run / "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["step"] == "1"]
    found = {name: float(value) for name, value in row.items() if value}
    assert "kl_loss" not in found and found["reward/std"] > 0

    # Both formulas again, from the trajectories: an advantage for each response, its loss where the ratio is 1.
    lines = [json.loads(line) for line in (run / "trajectories/train-000001-rank0.jsonl").read_text().splitlines()]
    advantages, per_token, losses = [], [], []
    for _, group in itertools.groupby(lines, key=lambda line: line["uid"]):
        responses = list(group)
        rewards = sorted(one["reward"] for one in responses)
        baseline = rewards[math.floor(0.4 * (len(rewards) - 1))]
        for one in responses:
            advantages.append(one["reward"] - baseline)
            per_token += [advantages[-1]] * one["response_tokens"]
            losses.append(-(2 / (1.0 if advantages[-1] > 0 else 1.05)) * advantages[-1])
    assert min(advantages) < 0 < max(advantages)
    assert found["advantage/mean"] == pytest.approx(statistics.fmean(per_token), rel=1e-5)
    assert found["advantage/std"] == pytest.approx(statistics.pstdev(per_token), rel=1e-5)
    assert found["policy_loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    monkeypatch.syspath_prepend(CUSTOM)
    from my_algorithm import QuantileAdvantage, SoftClip

    return Algorithm(advantage=QuantileAdvantage(0.5), objective=SoftClip(2.0, 4.0), kl="none")


def batch(rewards: list[float], groups: list[int], lengths: list[int]) -> Batch:
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    return Batch(
        sequences=[torch.arange(1 + length) for length in lengths],
        prompt_lengths=torch.ones(len(lengths), dtype=torch.int64),
        response_mask=mask,
        group_ids=torch.tensor(groups),
        rewards=torch.tensor(rewards),
        log_probs_rollout=torch.zeros(mask.shape),
    )


def test_the_quantile_is_of_the_trained_responses_of_a_group(custom: Algorithm) -> None:
    # A group of one, equal rewards, and a response that is not trained on.
    step = batch([3.0, 1.0, 1.0, 5.0, 2.0, 9.0, 7.0], [0, 1, 1, 2, 2, 2, 2], [1, 1, 2, 1, 3, 1, 0])
    custom.prepare(step, gather=lambda x: x)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, -3.0, 4.0, 0.0])
    assert torch.equal(step.advantages, expected[:, None] * step.response_mask)


def test_the_soft_clip_fades_on_both_sides_and_is_ppo_at_ratio_1(custom: Algorithm) -> None:
    step = batch([0.0] * 4, [0] * 4, [3] * 4)
    step.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 3)
    log_probs = torch.tensor([0.0, 0.0, 1.0, -1.0])[:, None].expand(4, 3).clone().requires_grad_()
    custom.objective(log_probs, step).sum().backward()
    slopes = -log_probs.grad[:, 0] / log_probs.exp()[:, 0]
    fade = [1 / math.cosh(2.0 / 2 * (math.e - 1)) ** 2, 1 / math.cosh(4.0 / 2 * (1 / math.e - 1)) ** 2]
    torch.testing.assert_close(slopes, torch.tensor([1.0, -1.0, fade[0], -fade[1]]))


@pytest.mark.parametrize("world", ["shapes", "tones"])
def test_a_seed_decides_over_a_quickstarts_model_and_data(world: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(ROOT / "examples/quickstart"))
    write = importlib.import_module(world).write
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        write(tmp_path / name, seed, True)
    for made in ("untrained/model.safetensors", "lessons.jsonl", "held_out.jsonl"):
        one, again, other = ((tmp_path / name / made).read_bytes() for name in ("one", "again", "other"))
        assert one == again != other
