"""AVQA's questions and the sound of its clips to ``runs/audio_qa``: multiple choice, answered by a letter.

    python examples/gsm8k_geo3k/prepare_audio_qa.py train_qa.json val_qa.json --wavs WAV_FOLDER

The two files are AVQA's own (a JSON list), or in R1-AQA's format (JSON Lines with an ``audio_path`` each). AVQA
publishes no sound: cut the clips of VGGSound that it names to WAV files, ``<YouTube id>_<second>.wav`` as R1-AQA calls
them, or ``<video_name>.wav``. Clips that are not there are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightrft.data.json_records import load_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="questions to train on")
    parser.add_argument("held_out", type=Path, help="questions to evaluate on")
    parser.add_argument(
        "--wavs", type=Path, default=Path(), help="folder of the clips; relative audio_paths are in it too"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/audio_qa"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "held_out"):
        rows = load_json([getattr(options, name)])
        records = list(heard(rows, options.wavs))
        if not records:
            raise SystemExit(
                f"None of the {len(rows)} clips of {getattr(options, name)} is in {options.wavs}; see --wavs."
            )
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (options.out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{len(records)} questions in {options.out / name}.jsonl, {len(rows) - len(records)} without their clip")


def heard(rows: Iterable[dict[str, Any]], wavs: Path) -> Iterable[dict[str, str]]:
    """Records of the questions whose clip is there."""
    for row in rows:
        found = next((path for path in places(row, wavs) if path.is_file()), None)
        if found is not None:
            yield record(row, found)


def places(row: dict[str, Any], wavs: Path) -> Iterable[Path]:
    """Where the sound of a question may be."""
    if "audio_path" in row:
        yield wavs / row["audio_path"]
        return
    video, _, second = row["video_name"].rpartition("_")
    yield wavs / f"{video}_{int(second)}.wav"
    yield wavs / f"{row['video_name']}.wav"


def record(row: dict[str, Any], wav: Path) -> dict[str, str]:
    """The clip, the question about what is heard, and the options by letter; the reference is one."""
    options = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, row["multi_choice"])]
    question = row["question_text"].replace("video", "audio")
    return {
        "input": "\n".join([f"<audio>{question}", *options, "Answer with the letter of the right option."]),
        "audios": str(wav.resolve()),
        "reference": string.ascii_uppercase[row["answer"]],
    }


if __name__ == "__main__":
    main()
