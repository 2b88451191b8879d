"""``trainer.strategy`` in YAML: a name, a class, or one for each model; on real ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import small_config
from ranks import on_ranks
from trainer import tiny_run


def _fit(path: str) -> None:
    from lightrft.cli.fit import main

    sys.argv = ["lightrft"]
    main(["fit", "--config", path])


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp2",
        {"class_path": "FSDP2", "init_args": {"replicas": 2}},
        {"default": "ddp", "actor": {"class_path": "lightrft.strategies.ZeRO", "init_args": {"stage": 1}}},
    ],
    ids=["name", "class", "by model"],
)
def test_a_strategy_by_name_by_class_and_by_model(inputs: Path, tmp_path: Path, strategy: Any) -> None:
    config = small_config.config(inputs, tmp_path / "runs")
    config["trainer"] |= {"strategy": strategy, "devices": 2, "max_iterations": 2}
    on_ranks(2, _fit, small_config.written(tmp_path / "config.yaml", config))
    assert set(tiny_run.rows(small_config.runs(tmp_path / "runs")[-1])) == {0, 1, 2}


def test_a_stock_strategy_is_refused_before_anything_runs(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightrft.cli.fit import main

    config = small_config.config(inputs, tmp_path / "runs")
    config["trainer"] |= {"strategy": {"class_path": "lightning.fabric.strategies.DeepSpeedStrategy"}}
    monkeypatch.setattr(sys, "argv", ["lightrft"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match=r"Fabric's own DeepSpeedStrategy.*use zero2"):
        main(["fit", "--config", small_config.written(tmp_path / "config.yaml", config)])
    assert not (tmp_path / "runs").exists()
