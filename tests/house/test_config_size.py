"""A user may set fewer than 120 things: the configuration, every shipped callback in it, is read in one go."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipped import ROOT

import lightrft.callbacks
from lightrft.callback import RFTCallback

ALGORITHM = {"class_path": "lightrft.algorithms.Algorithm"}
RECIPES = {"exact_match": [{"reward": {"class_path": "lightrft.rewards.ExactMatch"}}]}


def leaves(settings: Any) -> int:
    """Scalars, and empty lists, dicts and nulls, counted one each."""
    parts = list(settings.values()) if isinstance(settings, dict) else settings if isinstance(settings, list) else []
    return sum(map(leaves, parts)) or 1


def shipped_callbacks() -> list[str]:
    found = [getattr(lightrft.callbacks, name) for name in lightrft.callbacks.__all__]
    return [one.__name__ for one in found if isinstance(one, type) and issubclass(one, RFTCallback)]


def everything(config: Path) -> dict[str, Any]:
    """The quickstart with all that is shipped written out."""
    settings = yaml.safe_load(config.read_text())
    callbacks = settings["trainer"]["callbacks"]
    listed = {callback["class_path"].rpartition(".")[2] for callback in callbacks}
    callbacks += [{"class_path": name} for name in shipped_callbacks() if name not in listed]
    settings["model"] |= {"algorithm": ALGORITHM, "rewards": {"recipes": RECIPES}}
    return settings


def printed(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    from lightrft.cli.fit import main

    path.write_text(yaml.safe_dump(settings))
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--print_config"])
    return yaml.safe_load(out.getvalue())


def test_leaves_are_counted_recursively() -> None:
    assert leaves({"a": 1, "b": [1, 2, {"c": None}], "d": [], "e": {}}) == 6


def test_the_whole_configuration_has_fewer_than_120_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightrft"])
    whole = printed(everything(ROOT / "configs/quickstart.yaml"), tmp_path / "everything.yaml")
    names = {callback["class_path"].rpartition(".")[2] for callback in whole["trainer"]["callbacks"]}
    assert names == set(shipped_callbacks())
    for expanded in (
        whole["model"]["algorithm"],
        whole["model"]["rewards"]["init_args"]["recipes"]["exact_match"][0]["reward"],
    ):
        assert expanded["init_args"]
    assert leaves(whole) < 120, f"{leaves(whole)} leaves:\n{yaml.safe_dump(whole)}"
