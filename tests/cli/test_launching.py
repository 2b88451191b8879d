"""Every documented way to start two processes gives the metrics of one; numbers that do not fit are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import small_config
from lightning.fabric import Fabric
from trainer import tiny_run

from lightrft.cli import fit as cli
from lightrft.strategies import launch, make_fabric

INSTALLED = Path(sys.executable).parent
TWO = ["--trainer.devices", "2"]
EXAMPLES = Path(__file__).parents[2] / "examples" / "cluster"
# Starts a task on each of two nodes, and ends with the first exit code that is not 0.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for task in 0 1; do SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" & done
wait -n && wait -n
"""
Command = tuple[list[str], dict[str, str]]


@pytest.fixture(scope="module")
def config(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launching") / "config.yaml"
    settings = small_config.config(inputs, path.parent / "runs")
    settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][:2]
    small_config.written(path, settings)
    return path


@pytest.fixture(scope="module")
def alone(config: Path) -> dict[int, dict[str, str]]:
    """Metrics of the run on one process, this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightrft"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        cli.main(fit(config, "alone"))
    (folder,) = small_config.runs(config.parent / "alone")
    return tiny_run.rows(folder)


def fit(config: Path, case: str, *arguments: str) -> list[str]:
    root = str(config.parent / case)
    return ["fit", "--config", str(config), "--trainer.default_root_dir", root, *arguments]


def metrics(config: Path, case: str, commands: list[Command]) -> dict[int, dict[str, str]]:
    """Run the commands together and read what the run wrote."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PL_"))}
    paths = {"PATH": os.pathsep.join([str(config.parent), str(INSTALLED), os.environ["PATH"]])}
    paths |= {"PYTHONPATH": os.pathsep.join(sys.path), "MASTER_PORT": str(ranks.free_port())}
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**clean, **paths, **environment})
        for command, environment in commands
    ]
    errors = "\n".join([process.communicate(timeout=300)[1] for process in processes])
    assert [process.returncode for process in processes] == [0] * len(processes), errors[-3000:]
    assert "terminate called" not in errors and "destroy_process_group" not in errors  # how ranks that leave apart end
    (folder,) = small_config.runs(config.parent / case)
    return tiny_run.rows(folder)


def test_by_itself(config: Path, alone: dict[int, dict[str, str]]) -> None:
    command = ["lightrft", *fit(config, "itself", *TWO)]
    check_same(metrics(config, "itself", [(command, {})]), alone)


def test_torchrun(config: Path, alone: dict[int, dict[str, str]]) -> None:
    command = [
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "lightrft.cli",
        *fit(config, "torchrun", *TWO),
    ]
    check_same(metrics(config, "torchrun", [(command, {})]), alone)


def test_torchrun_on_two_nodes(config: Path, alone: dict[int, dict[str, str]]) -> None:
    command = ["bash", str(EXAMPLES / "torchrun.sh"), *fit(config, "nodes")[1:]]
    place = {"NNODES": "2", "DEVICES": "1", "MASTER_ADDR": "127.0.0.1"}
    check_same(metrics(config, "nodes", [(command, {**place, "NODE_RANK": node}) for node in "01"]), alone)


def test_fabric_run(config: Path, alone: dict[int, dict[str, str]]) -> None:
    places = ["--devices", "2", "--main-port", str(ranks.free_port())]
    command = ["fabric", "run", *places, str(INSTALLED / "lightrft"), *fit(config, "fabric", *TWO)]
    check_same(metrics(config, "fabric", [(command, {})]), alone)


def test_srun(config: Path, alone: dict[int, dict[str, str]]) -> None:
    """Two tasks, on two nodes that are this one."""
    srun = config.with_name("srun")
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1"}
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), *fit(config, "srun-run")[1:]]
    check_same(metrics(config, "srun-run", [(command, job)]), alone)


def check_same(one: dict[int, dict[str, str]], other: dict[int, dict[str, str]]) -> None:
    assert one.keys() == other.keys()
    for step in one:
        assert one[step].keys() == other[step].keys()
        for name in one[step].keys() - {"weight_sync/mismatch_nats", "balance/busiest_over_mean"}:
            assert float(one[step][name]) == pytest.approx(float(other[step][name]), rel=1e-4, abs=1e-5), (step, name)


# --- numbers that do not fit -----------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))]:
        monkeypatch.delenv(name)
    yield monkeypatch


def fabric(**options: Any) -> Fabric:
    return make_fabric("auto", "32-true", accelerator="cpu", **options)


def test_torchrun_with_other_numbers_than_the_configurations(environment: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=r"torchrun started 2 .* 2 node.* --trainer\.devices 2 --trainer.num_nodes 2"):
        launch(fabric(devices=1))


def test_srun_with_other_numbers_than_the_configurations(environment: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "8", "NTASKS_PER_NODE": "4", "NNODES": "2", "PROCID": "0", "NODEID": "0"}.items():
        environment.setenv(f"SLURM_{name}", value)
    with pytest.raises(ValueError, match=r"srun started 4 .* 2 node.* --trainer\.devices 4 --trainer.num_nodes 2"):
        launch(fabric(devices=1))


def test_nodes_that_could_not_find_each_other(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"num_nodes is 2, but MASTER_PORT and NODE_RANK are not in the environment"):
        launch(fabric(devices=1, num_nodes=2))
