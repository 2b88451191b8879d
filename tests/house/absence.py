"""Imports in a fresh process from which distributions are missing, as if they had never been installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from shipped import ROOT, normalized

_CHILD = """
import importlib, importlib.util, json, re, sys, traceback
from importlib.machinery import PathFinder

absent, names, modules = json.loads(sys.argv[1])

class Absent(PathFinder):
    # Raising here would break find_spec(), with which libraries ask politely; None is what an absent package gives.
    # Others ask for the version (lightning_utilities.RequirementCache), so the metadata is gone too.
    @staticmethod
    def find_distributions(*context):
        found = PathFinder.find_distributions(*context)
        return (one for one in found if re.sub(r"[-_.]+", "-", one.name or "").lower() not in absent)

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in names else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Absent
present = [name for name in names if importlib.util.find_spec(name)]
assert not present, f"still importable: {present}"
faults = {}
for module in modules:
    try:
        importlib.import_module(module)
    except Exception:
        faults[module] = traceback.format_exc(limit=-3)
print(json.dumps(faults))
"""


def import_without(absent: set[str], modules: list[str], folder: Path) -> dict[str, str]:
    """Import modules with no CUDA device and without the distributions named; module -> traceback, of failures only."""
    names = [name for name, owners in packages_distributions().items() if {normalized(one) for one in owners} <= absent]
    names = sorted({name for name in names if name not in sys.stdlib_module_names and not name.startswith("_")})
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    }
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps([sorted(absent), names, modules])],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])
