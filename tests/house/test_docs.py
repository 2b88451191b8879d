"""The pages on algorithms say what the code does: their YAML, defaults, options, metrics, refusals and links."""

from __future__ import annotations

import csv
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from trainer import tiny_run

from lightrft.algorithms import LIKE, PRESETS, Algorithm, Axes
from lightrft.algorithms.advantages import AdvantageName
from lightrft.algorithms.aggregation import Aggregation
from lightrft.algorithms.combinations import effects
from lightrft.algorithms.corrections import Correction
from lightrft.algorithms.kl import KL
from lightrft.algorithms.log_ratios import RatioLevel
from lightrft.algorithms.policy_loss import ObjectiveName
from lightrft.algorithms.presets import OFF, GroupFilter
from lightrft.callbacks import KLController, Throughput, Validation, WeightSync
from lightrft.lightning_modules import CriticModule
from lightrft.module import RFTModule

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/algorithms").glob("*.md"))}
INDEX, ADDING = PAGES["README.md"], PAGES["adding.md"]
# The tables name what was chosen: nothing, where whitening and the bounds of a correction are left to the choice.
UNSET = OFF | {"whiten": None, "correction_low": None, "correction_high": None}


def section(page: str, title: str) -> str:
    return re.split(r"^## ", page.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def marked(name: str) -> str:
    return INDEX.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def table(text: str) -> list[list[str]]:
    """Cells of each row below the head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def at_work(axes: Axes) -> dict[str, Any]:
    """The axes that have an effect and are not off."""
    values = {f.name: getattr(axes, f.name) for f in fields(Axes)}
    effective = {name: works for name, (works, _) in effects(axes).items()}
    return {n: v for n, v in values.items() if effective.get(n, True) and not (n in UNSET and v == UNSET[n])}


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """What ``lightrft fit`` builds of the quickstart's configuration with a further one over it."""
    from lightrft.cli.fit import RFTCLI

    monkeypatch.setattr(sys, "argv", ["lightrft"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_module.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", ADDING, flags=re.DOTALL)))
    sys.modules.pop("my_module", None)

    def build(text: str) -> Any:
        (tmp_path / "over.yaml").write_text(text)
        configs = [str(ROOT / "configs/quickstart.yaml"), str(tmp_path / "over.yaml")]
        return RFTCLI(args=[word for path in configs for word in ("--config", path)], run=False)

    return build


def blocks(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_yaml_block_configures_what_it_says(page: str, configured: Callable[[str], Any]) -> None:
    for text in blocks(PAGES[page]):
        built = configured(text)
        wanted = yaml.safe_load(text).get("model", {}).get("algorithm", "grpo")
        init = {"preset": wanted} if isinstance(wanted, str) else wanted["init_args"]
        algorithm = built.model.algorithm
        base = LIKE[init["like"]] if "like" in init else PRESETS
        for f in fields(Axes):
            value = init.get(f.name, getattr(base[init.get("preset", "grpo")], f.name))
            path = value["class_path"] if isinstance(value, dict) else str(value)
            if path.startswith("my_module."):
                assert type(getattr(algorithm, f.name)).__name__ == path.rpartition(".")[2]
            else:
                assert getattr(algorithm.axes, f.name) == value, f.name


def test_the_adding_pages_classes_compute(configured: Callable[[str], Any]) -> None:
    (text,) = blocks(ADDING)
    algorithm = configured(text).model.algorithm
    import torch

    from lightrft.samples import Batch

    batch = Batch(
        sequences=[torch.arange(3)] * 4,
        prompt_lengths=torch.ones(4, dtype=torch.int64),
        response_mask=torch.ones(4, 2, dtype=torch.bool),
        group_ids=torch.tensor([0, 0, 1, 1]),
        rewards=torch.tensor([1.0, 3.0, 2.0, 2.0]),
        log_probs_rollout=torch.zeros(4, 2),
    )
    algorithm.prepare(batch, gather=lambda x: x)
    assert batch.advantages[:, 0].tolist() == [-2.0, 0.0, 0.0, 0.0]
    loss = algorithm.objective(torch.full((4, 2), 0.5), batch)
    expected = 2 * torch.tensor(0.5).exp() + 0.1 * 0.25
    torch.testing.assert_close(loss[0], expected.expand(2))


# --- pages of presets -------------------------------------------------------------------------------------------------


def test_every_preset_has_a_page_and_every_page_a_subject() -> None:
    assert set(PAGES) == {f"{preset}.md" for preset in PRESETS} | {"README.md", "adding.md", "peers.md"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_page_has_its_equation_its_yaml_its_picture_and_its_defaults(preset: str) -> None:
    page = PAGES[f"{preset}.md"]
    assert page.startswith("# ") and f"(`{preset}`)" in page.splitlines()[0]
    assert r"\mathcal{L}" in section(page, "Equation") and section(page, "Equation").count("$$") % 2 == 0
    assert blocks(page)[0].startswith(f"model:\n  algorithm: {preset}\n")
    assert any(f"preset: {preset}," in block for block in blocks(page))
    assert f"](../images/learn/{preset}.png)" in page
    rows = table(section(page, "Defaults"))
    assert all(source for _, _, source in rows)
    shown = {names(axis)[0]: yaml.safe_load(names(value)[0]) for axis, value, _ in rows}
    assert shown == at_work(PRESETS[preset])


def test_pages_name_metrics_that_there_are() -> None:
    known = {*documented_metrics(), *inspect.signature(CriticModule).parameters}
    for preset in PRESETS:
        for name in names(section(PAGES[f"{preset}.md"], "What to watch")):
            assert name in known, f"{preset}: {name}"


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_table_of_presets_is_theirs() -> None:
    columns = ("advantage", "ratio", "objective", "clip_low", "clip_high", "aggregation", "kl", "kl_coefficient")
    unseen = {*columns, "std_epsilon", "gamma", "gae_lambda"}
    wanted = []
    for name, axes in PRESETS.items():
        kl = f"`{axes.kl}`" + (f" {axes.kl_coefficient}" if axes.kl != "none" else "")
        further = ", ".join(f"`{key}: {value}`" for key, value in at_work(axes).items() if key not in unseen)
        named = [f"`{axes.advantage}`", f"`{axes.ratio}`", f"`{axes.objective}`"]
        clips = f"{axes.clip_low}, {axes.clip_high}"
        wanted.append([f"[`{name}`]({name}.md)", *named, clips, f"`{axes.aggregation}`", kl, further])
    assert table(marked("presets")) == wanted


def test_every_option_and_every_choice_is_named_on_the_index() -> None:
    options = set(inspect.signature(Algorithm).parameters)
    choices = [AdvantageName, RatioLevel, ObjectiveName, Aggregation, KL, Correction, GroupFilter]
    options |= {choice for axis in choices for choice in get_args(axis)}
    body = section(INDEX, "The axes")
    missing = {name for name in options - {"preset"} if not re.search(rf"`{name}[`:]", body)}
    assert not missing and all(f"`like: {project}`" in body for project in LIKE)


def test_what_the_index_calls_refused_is_refused() -> None:
    rows = table(section(INDEX, "What is refused"))
    assert len(rows) > 10
    for arguments, _ in rows:
        with pytest.raises(ValueError):
            Algorithm(**yaml.safe_load(names(arguments)[0]))


def documented_metrics() -> list[str]:
    return [name for cell, _ in table(marked("metrics")) for name in names(cell)]


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Columns of ``metrics.csv`` of three runs in which everything is on once."""
    folder = tmp_path_factory.mktemp("metrics")
    inputs = tiny_run.write_inputs(folder / "inputs")
    extras = {"correction": "token_tis", "top_entropy_fraction": 0.5, "entropy_bonus": 0.01, "drift": 0.1}
    found: set[str] = set()
    for number, (algorithm, critic) in enumerate(
        [
            (Algorithm("dapo", kl="loss_k3", **extras), None),
            (Algorithm("ppo"), CriticModule(config=tiny_run.QWEN2)),
            (Algorithm("remax"), None),
        ]
    ):
        actor, scorer = tiny_run.actor(inputs), tiny_run.scoring(tiny_run.shortness)
        usual = [tiny_run.sampler(), WeightSync(), Throughput(), KLController(target=0.05), Validation()]
        model = RFTModule(actor, algorithm, scorer, critic)
        run = tiny_run.fit(inputs, folder / str(number), usual=usual, model=model, max_iterations=1)
        with (Path(run.log_dir) / "metrics.csv").open() as file:
            found |= set(next(csv.reader(file)))
    return found


def test_the_metrics_are_those_that_runs_log(columns: set[str]) -> None:
    documented = documented_metrics()
    patterns = {name: re.compile(re.sub(r"<\w+>", r"[^/]+", name)) for name in documented}
    patterns["val/<metric>"] = re.compile("val/.+")
    unknown = {column for column in columns if not any(one.fullmatch(column) for one in patterns.values())}
    unlogged = {name for name, one in patterns.items() if not any(one.fullmatch(column) for column in columns)}
    assert not unknown and not unlogged
    bare = {column.removeprefix("val/") for column in columns if column.startswith("val/")}
    assert all(any(one.fullmatch(column) for one in patterns.values()) for column in bare)


def test_the_learning_table_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import learn

    results = json.loads(learn.RESULTS.read_text())
    assert marked("learn") == learn.table(results), (
        "run: cd benchmarks && python -c 'import learn; learn.write_table()'"
    )
    assert list(results["runs"]) == list(PRESETS)


# --- balance ----------------------------------------------------------------------------------------------------------


def test_the_page_on_balance_is_that_of_the_results_and_they_meet_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import balance

    assert json.loads(balance.LENGTHS.read_text()) == balance.sample()
    results = json.loads(balance.RESULTS.read_text())
    assert balance.page(results) == balance.PAGE.read_text(), "run: make balance"
    assert balance.compute()["cases"] == results["cases"], "run: make balance"
    assert all(max(balance.of_goal(one)) <= balance.GOAL for one in results["cases"])


def test_the_page_on_balance_with_images_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import balance_media

    assert json.loads(balance_media.MIX.read_text()) == balance_media.sample()
    results = json.loads(balance_media.RESULTS.read_text())
    assert balance_media.page(results) == balance_media.PAGE.read_text(), (
        "run: python benchmarks/balance_media.py --keep"
    )
    own, balanced = results[:2]
    assert balanced["counted_micro_step"] <= 1.05 and balanced["rank"] <= 1.05
    assert all(balanced[name] <= 0.7 * own[name] for name in ("ddp_seconds", "fsdp2_seconds"))


# --- links ------------------------------------------------------------------------------------------------------------


def links(page: str) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link that is not to the web."""
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|\$\$.*?\$\$", "", page, flags=re.DOTALL)):
        if not link.startswith("http"):
            yield link.partition("#")[0], link.partition("#")[2]


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder", ["docs/algorithms", "examples/custom_algorithm"])
def test_links_lead_somewhere(folder: str) -> None:
    for page in (ROOT / folder).glob("*.md"):
        for path, anchor in links(page.read_text(encoding="utf-8")):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: #{anchor}"


def test_pages_name_make_targets_that_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for name, page in PAGES.items():
        for target in re.findall(r"`make ([\w-]+)`", page):
            assert target in targets, f"{name}: make {target}"
