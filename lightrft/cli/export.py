"""``lightrft export CHECKPOINT FOLDER``: a Hugging Face folder of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from lightrft.checkpoint import is_checkpoint


def export(checkpoint: str, folder: str, lora: Literal["merged", "apart"] = "merged") -> None:
    """Write the policy's weights, configuration and tokenizer as a folder that ``from_pretrained`` loads.

    Needs neither a GPU nor as many processes as the run had, but host memory for the weights.

    Args:
        checkpoint: a folder that RFTCheckpoint wrote, under whatever strategy.
        folder: the folder to be written; new or empty.
        lora: merged adds the adapters to the weights; apart writes a peft folder of the adapters alone.

    Raises:
        SystemExit: there is no such checkpoint, it is damaged, or the folder is taken.
    """
    place = Path(folder)
    if not is_checkpoint(Path(checkpoint)):
        raise SystemExit(f"{checkpoint!r} is no checkpoint folder (it has no checkpoint.json).")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise SystemExit(f"{folder!r} is there already; name a new folder.")
    from lightrft.lightning_modules import exported

    try:
        exported.export(Path(checkpoint), place, lora)
    except (ValueError, ImportError) as error:
        raise SystemExit(str(error)) from error
    print(f"Hugging Face folder: {folder}")


def main(argv: list[str] | None = None) -> None:
    """The command line of :func:`export`."""
    auto_cli(export, args=argv, prog="lightrft export")


if __name__ == "__main__":
    main()
