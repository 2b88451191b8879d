"""Who may import whom: an upper floor a lower one, never the reverse, and nothing optional before it is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires

from absence import import_without
from shipped import KERNELS, PYPROJECT, Import, distributions, floor_of, imports_of, normalized, shipped_modules

import lightrft

MODULES = shipped_modules()
FLOOR = {module: floor for module in MODULES if (floor := floor_of(module)) is not None}
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
FOR_DEVELOPERS = {"docs", "test", "peers", "dev"}
CORE = distributions(PYPROJECT["project"]["dependencies"])
OPTIONAL = distributions([one for extra in EXTRAS.values() for one in extra]) - CORE - {"lightning-rft"}
OFFERED = distributions([one for name, extra in EXTRAS.items() if name not in FOR_DEVELOPERS for one in extra])
PROVIDERS = packages_distributions()
INSTALLED = {normalized(name) for names in PROVIDERS.values() for name in names}


def all_imports() -> Iterator[tuple[str, Import]]:
    return ((module, found) for module in FLOOR for found in imports_of(MODULES[module].read_text()))


def target_of(found: Import) -> str:
    """The module of ours that an import reaches; ``from lightrft import RFTTrainer`` reaches the trainer."""
    _, _, name = found.module.partition(".")
    return lightrft._MODULE_OF.get(name) or (found.module if floor_of(found.module) is not None else "lightrft")


def providers(found: Import) -> set[str]:
    """Distributions that an imported top-level name may come from."""
    return {normalized(name) for name in PROVIDERS.get(found.top, [found.top])}


def third_party() -> Iterator[tuple[str, Import]]:
    known = sys.stdlib_module_names | {"lightrft"}
    imports = ((module, found) for module, found in all_imports() if found.top not in known)
    return ((module, found) for module, found in imports if module not in KERNELS or found.top != "triton")


def listed(faults: Iterator[tuple[str, Import]]) -> list[str]:
    return sorted({f"{MODULES[module].name} ({module}), line {found.line}: {found.module}" for module, found in faults})


def test_the_reader_sees_every_import_that_can_run_and_no_other():
    source = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import types_only
else:
    import otherwise
try:
    from c import d, e
except ImportError:
    pass
class K:
    import in_class
    def method(self):
        import in_method
        return importlib.import_module("by.name")
from . import sibling
"""
    found = {one.module: one.deferred for one in imports_of(source)}
    assert found == {
        "a.b": False,
        "typing.TYPE_CHECKING": False,
        "otherwise": False,
        "c.d": False,
        "c.e": False,
        "in_class": False,
        "in_method": True,
        "by.name": True,
        "..sibling": False,
    }


def test_every_module_stands_on_a_floor():
    assert sorted(MODULES.keys() - FLOOR.keys()) == [], "write their floor into FLOORS of tests/house/shipped.py"


def test_no_module_imports_an_upper_floor():
    ours = ((module, found) for module, found in all_imports() if found.top == "lightrft")
    assert listed((m, found) for m, found in ours if FLOOR[m] < (floor_of(target_of(found)) or 0)) == []


def test_our_own_imports_are_absolute_and_by_their_full_name():
    bare = {"", "callbacks", "lightning_modules"}
    assert listed((module, found) for module, found in all_imports() if found.top in bare) == []


def test_floors_0_and_1_import_only_torch_and_the_standard_library():
    def allowed(found: Import) -> bool:
        return found.top == "torch" or (found.deferred and bool(providers(found) & OFFERED))

    assert listed((m, found) for m, found in third_party() if FLOOR[m] <= 1 and not allowed(found)) == []


def test_optional_packages_are_imported_where_they_are_used():
    assert listed((m, found) for m, found in third_party() if not found.deferred and providers(found) & OPTIONAL) == []


def test_kernels_are_imported_where_they_run():
    assert (
        listed((module, found) for module, found in all_imports() if found.module in KERNELS and not found.deferred)
        == []
    )


def test_every_package_imported_is_one_that_the_distribution_asks_for():
    # What a core dependency itself always needs is there too: numpy, PyYAML, tokenizers, ...
    through_core = {need for name in CORE for need in requires(name) or [] if "extra ==" not in need}
    declared = CORE | OFFERED | distributions(sorted(through_core))
    assert listed((module, found) for module, found in third_party() if not providers(found) & declared) == []


def test_floors_0_to_3_import_without_a_gpu_and_without_optional_packages(tmp_path):
    # accelerate comes with peft, never with us.
    modules = [module for module, floor in FLOOR.items() if floor <= 3 and module not in KERNELS]
    absent = (OPTIONAL | {"accelerate"}) - {"setuptools"}
    faults = import_without(absent, modules, tmp_path)
    assert not faults, "\n".join(faults.values())


def test_floors_0_and_1_import_with_torch_alone(tmp_path):
    # numpy stays: torch does not ask for it, but takes it where it is.
    modules = [module for module, floor in FLOOR.items() if floor <= 1 and module not in KERNELS]
    faults = import_without(INSTALLED - with_needs("torch") - {"numpy", "lightning-rft"}, modules, tmp_path)
    assert not faults, "\n".join(faults.values())


def with_needs(distribution: str) -> set[str]:
    """A distribution and everything it needs, as installed here."""
    found, waiting = set(), {distribution}
    while waiting:
        name = waiting.pop()
        found.add(name)
        if name in INSTALLED:
            needs = [need for need in requires(name) or [] if "extra ==" not in need]
            waiting |= distributions(needs) - found
    return found
