"""A run on two ranks is the run on one: responses, rewards, metrics and, after three iterations, weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer import tiny_run

DRIVER = Path(__file__).with_name("ranks_driver.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Log folder by number of ranks."""
    inputs = tiny_run.write_inputs(tmp_path_factory.mktemp("ranks"))
    launchers = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(DRIVER.parent), *sys.path])}
    for launcher in launchers.values():
        command = [*launcher, str(DRIVER), str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "terminate called" not in done.stderr and "destroy_process_group" not in done.stderr
    return {ranks: inputs / f"ranks-{ranks}" / "version_0" for ranks in launchers}


def responses(log_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of all ranks by step, sorted; log-probs left out, which differ by rounding."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((log_dir / "trajectories").iterdir()):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line.pop("log_probs")
        found.setdefault(path.name.rsplit("-", 1)[0], []).extend(lines)
    return {step: sorted(lines, key=json.dumps) for step, lines in found.items()}


def test_the_same_tokens_and_rewards(runs: dict[int, Path]) -> None:
    assert responses(runs[1]) == responses(runs[2])


def test_the_same_metrics(runs: dict[int, Path]) -> None:
    one, two = tiny_run.rows(runs[1]), tiny_run.rows(runs[2])
    assert one.keys() == two.keys()
    for step in one:
        assert one[step].keys() == two[step].keys()
        for name in one[step].keys() - {"weight_sync/mismatch_nats"}:  # itself a rounding difference
            assert float(two[step][name]) == pytest.approx(float(one[step][name]), rel=1e-4, abs=1e-5), (step, name)


def test_the_same_weights(runs: dict[int, Path]) -> None:
    one, two = (torch.load(runs[n] / "checkpoints/iteration-000003/model.pt", weights_only=True) for n in (1, 2))
    for name, weight in one["module"].items():
        torch.testing.assert_close(two["module"][name], weight, rtol=0, atol=1e-5)
