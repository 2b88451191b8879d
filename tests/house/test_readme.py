"""What the README shows is what runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lightrft.cli import fit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example.replace("max_iterations=10", "max_iterations=1"), "README.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 1


def test_the_yaml_example_is_accepted_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(example)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightrft"])
    with pytest.raises(SystemExit) as stopped:
        fit.main(["fit", "--config", str(tmp_path / "mine.yaml"), "--print_config"])
    assert stopped.value.code == 0
    assert "class_path: lightrft.engines.TransformersEngine" in capsys.readouterr().out


def test_the_commands_name_files_and_options_that_exist() -> None:
    commands = [line.split("#")[0].split() for block in blocks("bash") for line in block.splitlines()]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in commands:
        if command[0] == "make":
            assert command[1] in targets
        for argument in command:
            assert not argument.startswith("configs/") or (ROOT / argument).is_file()


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        path = ROOT / link
        assert link.startswith("http") or path.is_dir() or path.stat().st_size > 0, link
