"""What the distribution ships, read from the source tree: its modules, their imports, and what pyproject declares."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = {"lightrft.callbacks": ROOT / "callbacks", "lightrft.lightning_modules": ROOT / "lightning_modules"}
FOLDERS = {"lightrft": ROOT / "lightrft", **PLUGINS}
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

FLOORS = {
    "lightrft": 0,
    "lightrft.samples": 0,
    "lightrft.whereabouts": 0,
    "lightrft.algorithms": 1,
    "lightrft.media": 1,
    "lightrft.ops": 1,
    "lightrft.analysis": 2,
    "lightrft.data": 2,
    "lightrft.engines": 2,
    "lightrft.random_state": 2,
    "lightrft.rewards": 2,
    "lightrft.strategies": 2,
    "lightrft.callback": 3,
    "lightrft.checkpoint": 3,
    "lightrft.interrupts": 3,
    "lightrft.learner": 3,
    "lightrft.module": 3,
    "lightrft.refill": 3,
    "lightrft.scoring": 3,
    "lightrft.sequence_cost": 3,
    "lightrft.trained": 3,
    "lightrft.trainer": 3,
    "lightrft.verdicts": 3,
    "lightrft.watchdog": 3,
    "lightrft.workload": 3,
    "lightrft.callbacks": 4,
    "lightrft.lightning_modules": 4,
    "lightrft.cli": 5,
    "lightrft.__main__": 5,
}

# Written in Triton, which only torch's CUDA builds bring: imported where they run, and nowhere else.
KERNELS = {"lightrft.ops.fingerprint_kernel"}


def shipped_files() -> dict[str, Path]:
    """Path inside the wheel -> file in the tree, for every file of the shipped folders."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*"):
            relative = file.relative_to(folder)
            through_link = any((folder / part).is_symlink() for part in [relative, *relative.parents])
            if file.is_file() and "__pycache__" not in relative.parts and not through_link:
                found[f"{package.replace('.', '/')}/{relative.as_posix()}"] = file
    return found


def shipped_modules() -> dict[str, Path]:
    """Dotted name -> file of every shipped module."""
    sources = {path: file for path, file in shipped_files().items() if path.endswith(".py")}
    return {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): sources[path] for path in sources}


def floor_of(module: str) -> int | None:
    """Floor of a module of ours; ``None`` when no floor is written down for it."""
    _, _, below = module.partition(".")
    return FLOORS.get(f"lightrft.{below.partition('.')[0]}" if below else module)


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def distributions(requirements: list[str]) -> set[str]:
    """Normalized names of the distributions that requirement strings name."""
    return {normalized(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]) for requirement in requirements}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: absolute dotted name; for ``from a import b`` it is ``a.b``. Relative imports keep their dots.
        line: where it stands.
        deferred: inside a function, so not run when the module is imported.
    """

    module: str
    line: int
    deferred: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_of(source: str) -> list[Import]:
    """Every import a module can run: statements and ``import_module("...")``, but not those for type checkers only."""
    return list(_imports(ast.parse(source), deferred=False))


def _imports(node: ast.AST, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), deferred)
            continue
        for name in _names(child):
            yield Import(name, child.lineno, deferred)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports(child, deferred or inside)


def _names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            return [f"{'.' * level}{module or ''}.{alias.name}" for alias in names]
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
            return [name] if called in {"import_module", "__import__"} else []
    return []
