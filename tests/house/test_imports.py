"""How the package is imported: lazily at the top, and under one name for every class."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from shipped import PLUGINS, PYPROJECT, ROOT, imports_of

import lightrft


def run(code: str, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd)


def test_importing_lightrft_alone_imports_no_library():
    child = run("import lightrft, sys; print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))")
    assert (child.returncode, child.stdout) == (0, "[]\n"), child.stderr


def test_engines_import_no_transformers_and_strategies_no_deepspeed():
    child = run(
        "import sys, lightrft.engines as e; print('transformers' in sys.modules); e.TransformersEngine; dir(e)\n"
        "import lightrft.strategies; print('deepspeed' in sys.modules)"
    )
    assert (child.returncode, child.stdout) == (0, "False\nFalse\n"), child.stderr


def test_the_version_is_the_one_of_the_distribution():
    assert lightrft.__version__ == PYPROJECT["project"]["version"]


@pytest.mark.parametrize("name", sorted(set(lightrft.__all__) - {"__version__"}))
def test_a_public_name_is_the_one_of_its_module(name):
    owner = lightrft._MODULE_OF[name]
    assert getattr(lightrft, name).__module__ == owner


def test_type_checkers_see_the_public_names_that_python_gives():
    tree = ast.parse((ROOT / "lightrft/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = imports_of(ast.unparse(ast.Module(block.body, [])))
    assert {tuple(one.module.rsplit(".", 1)) for one in seen} == {(m, n) for n, m in lightrft._MODULE_OF.items()}


def test_a_mistyped_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="RFTTrainr"):
        _ = lightrft.RFTTrainr


@pytest.mark.parametrize("package", sorted(PLUGINS))
def test_a_plugin_folder_refuses_its_bare_name_before_it_defines_anything(package):
    folder = PLUGINS[package].name
    child = run(f"import {folder}", cwd=str(ROOT))
    assert child.returncode != 0
    assert f"ImportError: This folder is the package {package}: write `import {package}`." in child.stderr
    docstring, refusal, *_ = ast.parse((PLUGINS[package] / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(refusal, ast.If) and isinstance(refusal.body[0], ast.Raise)
