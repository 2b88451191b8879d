"""The ``lightrft`` command: one file a command."""

from __future__ import annotations

import sys
from importlib import import_module

_COMMANDS = {
    "fit": "reinforcement fine-tuning with RFTTrainer, configured by YAML (--config, --print_config)",
    "validate": "score a model's responses to the validation prompts of the same YAML",
    "plan": "sizes and predicted memory of fit's YAML, on ranks that need not be there; refuses what cannot fit",
    "supervised": "fit, validate, test or predict with Lightning's Trainer: supervised fine-tuning",
    "export": "make a Hugging Face folder of a checkpoint of any strategy",
    "chat": "talk to a trained model's Hugging Face folder",
}


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: lightrft COMMAND ...\n")
        print("\n".join(f"  {command:12s}{what}" for command, what in _COMMANDS.items()))
        print("\nlightrft COMMAND --help shows a command's options.")
    elif name not in _COMMANDS:
        sys.exit(f"lightrft: no command {name!r}; there are {', '.join(_COMMANDS)}.")
    elif name in ("fit", "validate"):
        # LightningCLI reads sys.argv itself, as do the processes that a launcher starts with it.
        import_module("lightrft.cli.fit").main()
    else:
        import_module(f"lightrft.cli.{name}").main(sys.argv[2:])
