"""The wheel, in an empty environment that shares nothing with the source tree: what is shipped is what imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from shipped import FOLDERS, KERNELS, PLUGINS, ROOT, shipped_files, shipped_modules

_IMPORT_ALL = """
import importlib, json, sys
from importlib.metadata import distribution

where = {name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])}
(command,) = [one for one in distribution("lightning-rft").entry_points if one.name == "lightrft"]
assert callable(command.load())
print(json.dumps(where))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "without_cuda")}
    child = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return child.stdout


def build(tree: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source as git holds it: without the links to the plug-in folders that ``make install`` makes."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in [*FOLDERS.values(), ROOT / "tests"]:
        links = [inner.name for inner in folder.iterdir() if inner.is_symlink()]
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns(*links, "__pycache__"))
    for file in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build(tree)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel.

    It sees the libraries of this environment through a ``.pth``: such a path is searched, but the ``.pth`` files in it
    are not run, so an editable install of ours stays out.
    """
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (site / "libraries.pth").write_text("\n".join(libraries))
    return folder


def test_the_wheel_holds_every_file_of_the_three_folders_under_its_name_and_nothing_else(wheel):
    assert contents(wheel) == sorted(shipped_files())


def test_the_links_for_editors_change_nothing_in_the_wheel(tree, tmp_path):
    linked = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "dist", "*.egg-info"))
    for folder in PLUGINS.values():
        (linked / "lightrft" / folder.name).symlink_to(Path("..", folder.name))
    assert contents(build(linked)) == sorted(shipped_files())


def test_the_wheel_carries_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_every_module_and_the_command_import_from_the_wheel_alone(installed, tmp_path):
    modules = [name for name in shipped_modules() if not name.endswith("__main__") and name not in KERNELS]
    where = json.loads(run(installed / "bin/python", "-c", _IMPORT_ALL, json.dumps(modules), cwd=tmp_path))
    assert {name: file for name, file in where.items() if not Path(file).is_relative_to(installed)} == {}


@pytest.mark.parametrize("folder", [folder.name for folder in PLUGINS.values()])
def test_the_wheel_adds_no_top_level_name_but_lightrft(installed, tmp_path, folder):
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({folder!r}) is not None)"
    run(installed / "bin/python", "-c", code, cwd=tmp_path)
