"""Geometry3K from the Hugging Face hub to ``runs/geo3k``: Parquet with ``images``, ``problem`` and ``answer``.

    python examples/gsm8k_geo3k/prepare_geo3k.py

Images stay the encoded files they are. A problem that does not say where its images stand gets them before its text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightrft.data import DataSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="hiyouga/geometry3k", help="hub id, or a folder laid out as that repository"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/geo3k"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = DataSource(options.dataset, split=split).load()
        placed(rows).to_parquet(options.out / f"{split}.parquet")
        print(f"{len(rows)} problems in {options.out / split}.parquet")


def placed(rows: Any) -> Any:
    """The three columns, an ``<image>`` in the problem for each image."""

    def place(row: dict[str, Any]) -> dict[str, str]:
        missing = len(row["images"]) if "<image>" not in row["problem"] else 0
        return {"problem": "<image>" * missing + row["problem"]}

    return rows.select_columns(["images", "problem", "answer"]).map(place)


if __name__ == "__main__":
    main()
