"""Statistics over ranks are those of every rank's values, whatever names a rank has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DRIVER = Path(__file__).with_name("metrics_driver.py")


def test_two_ranks_with_differing_names_agree_on_the_numbers_of_both(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen(
            [sys.executable, str(DRIVER), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    shown = [child.communicate(timeout=100)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    first, second = (json.loads(text.splitlines()[-1]) for text in shown)
    both = np.array([1.0, 2.0, 6.0, 10.0])
    assert (
        first
        == second
        == pytest.approx(
            {
                "both/mean": both.mean(),
                "both/std": both.std(),
                "largest": 7.0,
                "a/only_rank_0/mean": 3.0,
                "a/only_rank_0/std": 1.0,
                "below_zero": -3.0,
                "z/only_rank_1": 8.0,
                "empty_on_rank_1/mean": 2.0,
                "empty_on_rank_1/std": 1.0,
            }
        )
    )
