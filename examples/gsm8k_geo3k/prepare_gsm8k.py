"""GSM8K from the Hugging Face hub to ``runs/gsm8k``: JSON Lines with the columns ``question`` and ``answer``.

    python examples/gsm8k_geo3k/prepare_gsm8k.py

The configuration reads them with ``format: gsm8k``: the reference is what follows ``####``, without commas.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightrft.data import DataSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="openai/gsm8k", help="hub id, or a folder laid out as that repository")
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    options = parser.parse_args()
    for split in ("train", "test"):
        rows = DataSource(options.dataset, split=split, subset="main").load()
        write(rows, options.out / f"{split}.jsonl")
        print(f"{len(rows)} problems in {options.out / split}.jsonl")


def write(rows: Any, path: Path) -> None:
    """One record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({key: row[key] for key in ("question", "answer")}, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
