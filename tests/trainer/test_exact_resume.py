"""A killed and resumed run is the uninterrupted run, bit by bit; two runs with one seed are one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer import tiny_run

DRIVER = Path(__file__).with_name("kill_driver.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    inputs = tiny_run.write_inputs(tmp_path_factory.mktemp("resume"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(DRIVER.parent), *sys.path])}
    command = [sys.executable, str(DRIVER), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_runs_with_one_seed_are_identical(report: dict[str, Any]) -> None:
    assert report["determinism"] == []


def test_a_run_killed_at_any_phase_boundary_resumes_bit_by_bit(report: dict[str, Any]) -> None:
    killed = {name: different for name, different in report.items() if name != "determinism"}
    assert len(killed) == 13 + 4 + 4 * 5
    assert {name: different for name, different in killed.items() if different} == {}
