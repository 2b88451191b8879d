"""The page on rollouts: its YAML configures what it says, its metrics are logged, its links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer import tiny_run

import lightrft.engines
from lightrft.algorithms import Algorithm
from lightrft.callbacks import AheadRollout, PartialRollout, WeightSync

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/rollouts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def built(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``lightrft fit`` makes of the quickstart's configuration with the page's over it."""
    from lightrft.cli.fit import RFTCLI

    monkeypatch.setattr(sys, "argv", ["lightrft"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    (folder / "over.yaml").write_text(text)
    configs = [str(ROOT / "configs/quickstart.yaml"), str(folder / "over.yaml")]
    return RFTCLI(args=[word for path in configs for word in ("--config", path)], run=False)


def test_partial_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = built(BLOCKS[0], tmp_path, monkeypatch)
    rollout = run.trainer.rollout
    assert type(rollout) is PartialRollout and run.model.algorithm.axes.correction == "token_tis"
    assert (rollout.segment_tokens, rollout.groups_in_flight, rollout.sampling.max_new_tokens) == (1024, 32, 8192)


@pytest.mark.skipif("OwnProcess" not in lightrft.engines.__all__, reason="OwnProcess is not there yet")
def test_ahead_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = built(BLOCKS[1], tmp_path, monkeypatch)
    rollout = run.trainer.rollout
    assert type(rollout) is AheadRollout and rollout.engine.in_own_process
    assert run.model.algorithm.axes.correction == "token_tis" and len(BLOCKS) == 2


def test_the_metrics_are_those_that_runs_log(tmp_path: Path) -> None:
    inputs = tiny_run.write_inputs(tmp_path)
    usual = [tiny_run.partial(), WeightSync()]
    model = tiny_run.module(inputs, Algorithm(correction="token_tis"))
    run = tiny_run.fit(inputs, tmp_path, usual=usual, model=model, max_iterations=1)
    logged = {name for row in tiny_run.rows(run.log_dir).values() for name in row if name.startswith("rollout/")}
    assert logged == set(re.findall(r"`(rollout/\w+)`", PAGE))


def test_links_lead_somewhere() -> None:
    for path, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", PAGE):
        target = (ROOT / "docs" / path).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", target, flags=re.MULTILINE)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]
