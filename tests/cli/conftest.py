from __future__ import annotations

from pathlib import Path

import pytest
from trainer import tiny_run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and sums of the tiny run."""
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_seed_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run leaves its seed there for the processes it starts."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
