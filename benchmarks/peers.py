"""Ours beside TRL, verl and OpenRLHF: measured against TRL's own code, and axis by axis from ``PRESETS`` and ``LIKE``.

    python benchmarks/peers.py            # about a minute; `make peers`; needs the extra peers
    python benchmarks/peers.py --keep     # write the page again from what was measured

Writes ``benchmarks/results/peers.json`` and the tables of ``docs/algorithms/peers.md``; exits with 1 where ours and TRL
differ by more than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from trl_cases import AGREE, CASES, CUTS, DIFFER, ROWS, VERSION, Case, Step, differences, make_step, ours, theirs

from lightrft.algorithms import LIKE, PRESETS, Algorithm, Axes
from lightrft.algorithms.combinations import effects

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
PAGE = HERE.parent / "docs" / "algorithms" / "peers.md"
TOLERANCE, STEPS = 1e-6, 300
PROJECTS = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF"}
COMPARED = ("loss", "gradient", "advantages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="take what was measured before")
    if not parser.parse_args().keep:
        torch.set_num_threads(1)
        versions = {"trl": VERSION, "torch": torch.__version__, "python": platform.python_version()}
        worst = {name: measure(name) for name in CASES}
        RESULTS.write_text(json.dumps({**versions, "steps": STEPS, "worst": worst}, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    sys.exit("\n".join(missed(results["worst"])) or 0)


# --- measured --------------------------------------------------------------------------------------------------------


def measure(name: str) -> dict[str, float]:
    """Largest difference over ``STEPS`` random steps, by what is compared."""
    chance, case = random.Random(0), CASES[name]
    worst = dict.fromkeys(COMPARED, 0.0)
    for seed in range(STEPS):
        step, cut, vllm = draw(chance, case, seed)
        found = differences(ours(case.algorithm(), step, cut), theirs(name, step, cut, vllm))
        worst = {key: max(worst[key], found[key]) for key in worst}
    if not case.compares_loss:
        del worst["loss"]
    print(f"{name:30s} " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()), flush=True)
    return {key: float(f"{value:.1e}") for key, value in worst.items()}


def draw(chance: random.Random, case: Case, seed: int) -> tuple[Step, tuple[int, int], bool]:
    """A step that the case may be compared on, how it is cut, and whether vLLM sampled."""
    samples = chance.choice((2, 3, 4, 6))
    vllm = case.corrects and chance.random() < 0.5
    step = make_step(
        seed,
        samples,
        moved=0.0 if case.on_policy else chance.choice((0.0, 0.25, 4.0)),
        mismatch=chance.choice((0.05, 0.3, 1.0)) if vllm else 0.0,
        spread=chance.choice((1.0, 2**-8)),
        equal=chance.randrange(ROWS // samples),
    )
    return step, chance.choice(CUTS), vllm


def missed(worst: dict[str, dict[str, float]]) -> list[str]:
    """Cases that differ though they should not, and the reverse."""
    far = {name for name, found in worst.items() if max(found.values()) > TOLERANCE}
    failures = [f"{name}: differs by {max(worst[name].values())}" for name in AGREE if name in far]
    return failures + [f"{name}: no longer differs" for name in DIFFER if name not in far]


# --- the page --------------------------------------------------------------------------------------------------------


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with today's tables between its marks."""
    for name, text in {"measured": measured(results), "differ": differing(results), "axes": axes()}.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"{PAGE.name} has no <!-- {name} --> and <!-- /{name} -->.")
        page = before + mark + text + end + after
    return page


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def measured(results: dict[str, Any]) -> str:
    rows = []
    for name, case in AGREE.items():
        found = results["worst"][name]
        rows.append([*calls(case), *(f"{found[key]:.0e}" if key in found else "other" for key in COMPARED)])
    versions = f"TRL {results['trl']}, torch {results['torch']}, float64; the worst of {results['steps']} steps each."
    return f"{versions}\n\n" + table(["TRL", "ours", *COMPARED], rows)


def differing(results: dict[str, Any]) -> str:
    found = results["worst"]
    rows = [[*calls(case), f"{found[name]['gradient']:.1f}", case.differs] for name, case in DIFFER.items()]
    return table(["TRL", "ours", "gradient", "because"], rows)


def calls(case: Case) -> list[str]:
    """What is written to get each of the two."""
    config, axes = (
        ", ".join(f"{name}={value!r}" for name, value in options.items()).replace("'", '"')
        for options in (case.config, {"preset": case.preset, "like": "trl"} | case.axes)
    )
    return [f"`{case.trainer}Config({config})`" + " on policy" * case.on_policy, f"`Algorithm({axes})`"]


def axes() -> str:
    """For every preset that another project has: the axes on which not all choose the same."""
    text = ""
    for preset in PRESETS:
        having = [project for project in PROJECTS if preset in LIKE[project]]
        columns = [chosen(Algorithm(preset, like)) for like in (None, *having)]  # type: ignore[arg-type]
        rows = [
            [f"`{name}`", *(f"`{column[name]}`" if name in column else "–" for column in columns)]
            for name in (f.name for f in fields(Axes))
            if len({column.get(name) for column in columns}) > 1
        ]
        if having:
            names = ", ".join(PROJECTS[project] for project in PROJECTS if project not in having)
            missing = f"Not in {names}.\n\n" if names else ""
            text += f"### `{preset}`\n\n{missing}"
            text += table(["axis", "ours", *(PROJECTS[project] for project in having)], rows) + "\n"
    return text.rstrip("\n") + "\n"


def chosen(algorithm: Algorithm) -> dict[str, str]:
    """The axes that have an effect, as YAML has them."""
    values = asdict(algorithm.axes) | {"whiten": algorithm.whitens}
    if algorithm.axes.correction != "none":
        values |= dict(zip(("correction_low", "correction_high"), algorithm.correction_bounds))
    works = {name: effective for name, (effective, _) in effects(algorithm.axes).items()}
    return {name: shown(value) for name, value in values.items() if works.get(name, True)}


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
