"""A user may set fewer than 120 things: the configuration, every shipped callback in it, is read in one go.

What means the same in two places is one thing to know: the keys of a source for training and for validation, those of a
model for actor and critic, of Rollout and the two callbacks that may take its place. What other packages define is not
ours to count: an optimizer's own arguments, and what Lightning's users set by the same name to the same effect.
"""

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

LIGHTNINGS = (
    "accelerator",
    "devices",
    "num_nodes",
    "logger",
    "default_root_dir",
    "fast_dev_run",
    "gradient_clip_val",
)
ALGORITHM = {"class_path": "lightrft.algorithms.Algorithm", "init_args": {"preset": "ppo"}}
CRITIC = {"class_path": "CriticModule", "init_args": {"model": "runs/quickstart/supervised/huggingface"}}
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
    settings["model"] |= {"algorithm": ALGORITHM, "critic": CRITIC, "rewards": {"recipes": RECIPES}}
    return settings


def ours_once(settings: Any) -> Any:
    """Without what another package defines, and without the second place of what means the same."""
    if isinstance(settings, list):
        return [ours_once(one) for one in settings]
    if not isinstance(settings, dict):
        return settings
    if "class_path" in settings and not settings["class_path"].startswith("lightrft."):
        return settings["class_path"]
    kept = {key: ours_once(value) for key, value in settings.items()}
    for first, second in (("train", "val"), ("actor", "critic")):
        if isinstance(kept.get(first), dict) and isinstance(kept.get(second), dict):
            kept[second] = _without(kept[second], kept[first])
    if "callbacks" in kept:
        kept["callbacks"] = _alternatives_once(kept["callbacks"])
    return {key: value for key, value in kept.items() if value != {}}


def _alternatives_once(callbacks: list[Any]) -> list[Any]:
    """A run has one rollout callback: of the others what is their own."""
    by_name = {callback["class_path"].rpartition(".")[2]: callback for callback in callbacks}
    others = [name for name in by_name if issubclass(getattr(lightrft.callbacks, name), lightrft.callbacks.Rollout)]
    for name in set(others) - {"Rollout"}:
        by_name[name] = _without(by_name[name], by_name["Rollout"])
    return list(by_name.values())


def _without(settings: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """What ``settings`` has besides the keys of ``known``; a class and its arguments stay a class."""
    if "init_args" in settings:
        return {"class_path": settings["class_path"], **_without(settings["init_args"], known["init_args"])}
    return {key: value for key, value in settings.items() if key not in known}


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
    del whole["seed_everything"], whole["ckpt_path"]
    for name in LIGHTNINGS:
        del whole["trainer"][name]
    counted = ours_once(whole)
    assert set(counted["model"]["critic"]) == {"class_path", "value_clip", "warmup_iterations"}
    assert leaves(counted) < 120, f"{leaves(counted)} leaves:\n{yaml.safe_dump(counted)}"
