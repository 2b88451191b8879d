"""The ready configurations of examples/gsm8k_geo3k run as they stand, on stand-ins for their data and models."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import yaml
from media_worlds import media_world, png, wav
from trainer import tiny_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightrft.callback import RFTCallback
from lightrft.cli.fit import main
from lightrft.samples import Rollout

EXAMPLE = Path(__file__).parents[2] / "examples" / "gsm8k_geo3k"
TURNS = "{% for message in messages %}[1]{{ message.content }}{% endfor %}[2]"
WITH_IMAGES = (
    "{% for message in messages %}[1]{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' "
    "else part.text }}{% endfor %}{% endif %}{% endfor %}[2]"
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    Seen.scored.clear()


def prepared(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLE / script), run_name="__main__")


def hub_folder(subset: str, splits: dict[str, list[dict[str, Any]]]) -> str:
    """Laid out as a repository of the hub."""
    folder = Path("hub")
    folder.mkdir()
    files = [{"split": split, "path": f"{split}.parquet"} for split in splits]
    card = yaml.safe_dump({"configs": [{"config_name": subset, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    for split, records in splits.items():
        datasets.Dataset.from_list(records).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def gsm8k(monkeypatch: pytest.MonkeyPatch) -> Any:
    problems = [{"question": f"{n} + {n}?", "answer": f"Twice {n}.\n#### {n},000"} for n in range(1, 5)]
    Path("inputs").mkdir()
    folder = hub_folder("main", {"train": problems, "test": problems[:2]})
    prepared("prepare_gsm8k.py", "--dataset", folder, monkeypatch=monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.write_inputs(Path("inputs").absolute()) / "tokenizer")
    config = AutoConfig.for_model(**tiny_run.QWEN2 | {"max_position_embeddings": 512})
    return AutoModelForCausalLM.from_config(config), tokenizer, TURNS


def geo3k(monkeypatch: pytest.MonkeyPatch) -> Any:
    feature = datasets.Features(
        {"images": [datasets.Image()], "problem": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    problems = [
        {"images": [{"bytes": png(n), "path": None}], "problem": "<image>" * (n % 2) + f"Find {n}.", "answer": "1.5"}
        for n in range(4)
    ]
    monkeypatch.setattr(datasets.Dataset, "from_list", lambda of, made=datasets.Dataset.from_list: made(of, feature))
    folder = hub_folder("default", {"train": problems, "validation": problems[:1], "test": problems[:2]})
    prepared("prepare_geo3k.py", "--dataset", folder, monkeypatch=monkeypatch)
    world = media_world("qwen2_5_vl")
    return world.model, world.processor, WITH_IMAGES


def audio_qa(monkeypatch: pytest.MonkeyPatch) -> Any:
    Path("wavs").mkdir()
    for number, name in enumerate(("a_b_30", "c_000007", "d_1")):
        (Path("wavs") / f"{name}.wav").write_bytes(wav(number))
    asked = {"question_text": "What happens in the video?", "multi_choice": ["a bell", "a dog", "rain"], "answer": 1}
    rows = [asked | {"video_name": name} for name in ("a_b_000030", "c_000007", "gone_000001", "d_000001")]
    Path("train_qa.json").write_text(json.dumps(rows))
    r1_aqa = [asked | {"dataset_name": "AVQA", "audio_path": "d_1.wav", "answer": 2}]
    Path("val.data").write_text("".join(json.dumps(row) + "\n" for row in r1_aqa))
    prepared("prepare_audio_qa.py", "train_qa.json", "val.data", "--wavs", "wavs", monkeypatch=monkeypatch)
    world = media_world("qwen2_audio")
    return world.model, world.processor, world.processor.default_chat_template


class Seen(RFTCallback):
    """What was scored, iteration by iteration."""

    scored: ClassVar[list[Rollout]] = []

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
        self.scored.append(rollout)


EXAMPLES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {"gsm8k": gsm8k, "geo3k": geo3k, "audio_qa": audio_qa}
REFERENCES = {"gsm8k": {"1000", "2000", "3000", "4000"}, "geo3k": {"1.5"}, "audio_qa": {"B"}}
USABLE = {"gsm8k": 4, "geo3k": 4, "audio_qa": 3}
MEDIA = {"gsm8k": [], "geo3k": ["images"], "audio_qa": ["audios"]}


@pytest.mark.parametrize(
    "name",
    [
        "gsm8k",
        pytest.param("geo3k", marks=pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")),
        "audio_qa",
    ],
)
def test_a_ready_configuration_runs_on_what_its_script_prepares(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, template = EXAMPLES[name](monkeypatch)
    model.save_pretrained("stand_in")
    monkeypatch.setattr(processor, "chat_template", template)
    processor.save_pretrained("stand_in")
    callbacks = yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text())["trainer"]["callbacks"]
    callbacks[0]["init_args"] = {"engine": "TransformersEngine", "sampling": {"max_new_tokens": 4}}
    callbacks.append({"class_path": f"{__name__}.Seen"})
    monkeypatch.setattr(sys, "argv", ["lightrft"])
    overrides = {
        "trainer.fast_dev_run": "true", "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.strategy": "auto",
        "trainer.precision": "32-true", "trainer.prompts_per_iteration": 4, "trainer.samples_per_prompt": 2,
        "trainer.responses_per_update": 4, "trainer.callbacks": json.dumps(callbacks),
        "model.actor.init_args.model": "stand_in",
    }  # fmt: skip
    main(["fit", "--config", str(EXAMPLE / f"{name}.yaml"), *(f"--{key}={value}" for key, value in overrides.items())])
    (samples,) = Seen.scored
    prompts = samples.prompts
    assert len({prompt.uid.partition("@")[0] for prompt in prompts}) == USABLE[name]
    assert {prompt.reference for prompt in prompts} == REFERENCES[name]
    assert all([kind for kind in ("images", "audios") if getattr(p.media, kind)] == MEDIA[name] for p in prompts)
    assert all(set(one.reward_parts) == {"math_accuracy", "boxed_format"} for _, one in samples)


def test_questions_about_sound_say_what_to_answer_and_clips_that_are_gone_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audio_qa(monkeypatch)
    assert "3 questions in runs/audio_qa/train.jsonl, 1 without their clip" in capsys.readouterr().out
    first = json.loads(Path("runs/audio_qa/train.jsonl").read_text().splitlines()[0])
    assert first["input"].splitlines()[:4] == ["<audio>What happens in the audio?", "A. a bell", "B. a dog", "C. rain"]
    assert (first["audios"], first["reference"]) == (str(Path("wavs/a_b_30.wav").resolve()), "B")
    held_out = json.loads(Path("runs/audio_qa/held_out.jsonl").read_text())
    assert (Path(held_out["audios"]).name, held_out["reference"]) == ("d_1.wav", "C")


def test_the_readme_leads_to_every_file_and_to_nothing_else() -> None:
    links = re.findall(r"\]\(([^):]+)\)", (EXAMPLE / "README.md").read_text())
    assert all((EXAMPLE / link).is_file() for link in links)
    assert {path.name for path in EXAMPLE.iterdir() if path.suffix in (".yaml", ".py")} <= set(links)
